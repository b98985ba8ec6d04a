"""Schedules: windows, ramps, per-sample gates, and that a gated sample is left alone bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.guidance import EnergyGuidance, Guidance, State, below, between, cosine, linear, sine, within
from genkit.levels import Level, levels_of
from genkit.sampling import sample

ROUTES = ("direct", "x0_detached", "through_denoiser")


def energy(x):
    return -(x - 0.3).square().flatten(1).sum(1)


def run(guidance, x, cls=DDIMScheduler, steps=8, kind="eps", seeds=None, on_step=None):
    scheduler = cls(**({"clip_sample": False} if cls is DDIMScheduler else {}))
    scheduler.set_timesteps(steps)
    return sample(
        GaussianMixtureDenoiser([-1.0, 1.0], 0.5, kind=kind), scheduler, x, guidance=guidance, seeds=seeds, on_step=on_step
    )


def noise(count=5):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def state_at(progress: float = 0.0, level: Level | None = None, count: int = 2) -> State:
    levels = [Level(0.8, 0.6, 0, i) for i in range(11)]
    return State(torch.zeros(count, 1, 2, 2), level or levels[round(10 * progress)], levels)


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        (linear(1, 3), 1, 2, 3),
        (cosine(1, 3), 1, 2, 3),
        (cosine(4, 0), 4, 2, 0),
        (sine(0.3), 1, 1.3, 1),
        (between(0.4, 0.6), 0, 1, 0),
    ],
)
def test_ramps(schedule, start, middle, end):
    assert [schedule(state_at(p)) for p in (0.0, 0.5, 1.0)] == pytest.approx([start, middle, end])
    assert cosine(1, 3)(state_at(0.2)) < linear(1, 3)(state_at(0.2))


@pytest.mark.parametrize(
    ("level", "on"),
    [(Level(1.0, 0.5, 0), True), (Level(1.0, 3.0, 0), False), (Level(0.8, 0.6, 0), True), (Level(0.6, 0.8, 0), True),
     (Level(0.2, 0.8, 0), False), (Level(0.9, 0.1, 0), False), (Level(0.0, 1.0, 0), False)],
)  # fmt: skip
def test_within_reads_the_noise_to_signal_ratio_of_any_family(level, on):
    assert within(0.5, 2.0)(state_at(level=level)) == float(on)
    assert within(0.2, math.inf)(state_at(level=Level(0.0, 1.0, 0))) == 1.0


def test_within_takes_a_level_for_each_sample():
    level = Level(torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.1, 0.8, 1.0]), 0)
    assert within(0.5, 2.0)(state_at(level=level, count=3)).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("cls", "kind"), [(EulerDiscreteScheduler, "eps"), (FlowMatchEulerDiscreteScheduler, "flow")])
def test_within_a_run(cls, kind):
    asked = []

    class Look(Guidance):
        def shift(self, state, prediction):
            asked.append(state.level.index)

    scheduler = cls()
    scheduler.set_timesteps(8)
    ratios = [math.inf if level.alpha == 0 else level.sigma / level.alpha for level in levels_of(scheduler)]
    run(Look().within(0.4, 6.0), noise(2), cls, kind=kind)
    assert asked == [i for i, ratio in enumerate(ratios) if 0.4 <= ratio <= 6.0]
    assert 0 < len(asked) < 8


@pytest.mark.parametrize("interval", [(-1, 2), (3, 2), (float("nan"), 1)])
def test_within_refuses(interval):
    with pytest.raises(ValueError, match=r"within\("):
        within(*interval)


def test_schedules_multiply():
    x = noise(2)
    guidance = EnergyGuidance(energy)
    one = run(guidance.scheduled(linear(0.5, 1)).scheduled(sine(1.0)).between(0.2, 0.8), x)
    both = lambda state: linear(0.5, 1)(state) * sine(1.0)(state) * between(0.2, 0.8)(state)  # noqa: E731
    torch.testing.assert_close(one, run(guidance.scheduled(both), x), rtol=1e-12, atol=1e-12)


# Gates: one weight for each sample


def odd(state: State) -> torch.Tensor:
    """Gate by the sample itself, so that it does not depend on the batch."""
    return (state.x[:, 0, 0, 0] > 0) | (state.progress < 0.2)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_gated_samples_stay_as_they_are(route, kind):
    x = noise()
    gate = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    bare, guided = run(None, x, kind=kind), run(EnergyGuidance(energy, 0.7, route).scheduled(lambda state: gate), x, kind=kind)
    off = gate == 0
    assert torch.equal(guided[off], bare[off])
    for i, scale in ((1, 0.7), (3, 1.4)):
        torch.testing.assert_close(guided[i : i + 1], run(EnergyGuidance(energy, scale, route), x[i : i + 1], kind=kind))


@pytest.mark.parametrize("route", ROUTES)
def test_splitting_a_gated_batch(route):
    """T11: the same samples whatever the batch, with gates, several energies, and a threshold on the log-potential."""
    a = EnergyGuidance(energy, 0.5, route).scheduled(odd)
    b = EnergyGuidance(lambda x: x.flatten(1).mean(1), 2.0, route, name="mean").scheduled(below(0.1, "mean"))
    x = noise()
    together = run(a + b, x)
    assert not torch.equal(together, run(a, x))
    apart = torch.cat([run(a + b, x[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)


def test_a_gate_of_zeros_costs_nothing():
    calls = []

    def counted(x):
        calls.append(1)
        return energy(x)

    x = noise()
    bare = run(None, x)
    assert torch.equal(run(EnergyGuidance(counted).scheduled(lambda state: torch.zeros(5)), x), bare)

    class Never(EnergyGuidance):
        def weight(self, state):
            return torch.zeros(len(state.x))

    assert torch.equal(run(Never(counted), x), bare)
    half = EnergyGuidance(counted).scheduled(lambda state: torch.tensor([1.0, 1, 1, 0, 0]))
    assert torch.equal(run(half.scheduled(lambda state: torch.tensor([0.0, 0, 0, 1, 1])), x), bare)
    assert not calls


def test_what_is_not_finite_in_a_gated_sample_does_no_harm():
    def bad(x):
        return energy(x) * torch.tensor([math.nan, 1.0, 1.0])

    x = noise(3)
    for route in ROUTES:
        guided = run(EnergyGuidance(bad, 1.0, route).scheduled(lambda state: torch.tensor([0.0, 1.0, 1.0])), x)
        assert torch.equal(guided[0], run(None, x)[0])
        assert torch.isfinite(guided).all()
        with pytest.raises(FloatingPointError):
            run(EnergyGuidance(bad, 1.0, route), x)


def test_below_stops_each_sample_for_good():
    seen = []
    guidance = EnergyGuidance(lambda x: x.flatten(1).mean(1), 200.0).scheduled(below(0.5))
    out = run(guidance, noise(), on_step=lambda state, prediction, x_next: seen.append(dict(state.energy)))
    values = torch.stack([energies["energy"] for energies in seen])
    reached = values >= 0.5
    assert reached[-1].all()
    assert not reached[0].all()
    # A sample that has reached it keeps the value that it reached.
    assert all(torch.equal(values[i + 1][row], values[i][row]) for i, row in enumerate(reached[:-1]))
    assert torch.isfinite(out).all()


def test_displacements_are_gated_too():
    class Push(Guidance):
        def before(self, state):
            return state.x + 0.5

        def after(self, state, x_next):
            return x_next * float("inf")

    state = state_at(count=3)
    gated = Push().scheduled(lambda state: torch.tensor([0.0, 1.0, 2.0]))
    assert gated.before(state)[:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert torch.isfinite(gated.after(state, state.x + 1)[0]).all()
    off = Push().scheduled(lambda state: torch.zeros(3))
    assert off.before(state) is state.x


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.ones(3), r"shape \(2,\)\); got shape \(3,\)"),
        (torch.ones(2, 1), r"got shape \(2, 1\)"),
        (float("nan"), "got nan"),
        (torch.tensor([1.0, math.inf]), "inf"),
        ("big", "got 'big'"),
        (None, "got None"),
    ],
)
def test_bad_weights(weight, says):
    with pytest.raises(ValueError, match=says):
        Guidance().scheduled(lambda state: weight).active(state_at())


@pytest.mark.parametrize("weight", [1, True, torch.tensor(2.0), torch.tensor([True, False])])
def test_good_weights(weight):
    assert Guidance().scheduled(lambda state: weight).active(state_at())


def test_a_level_for_each_sample():
    """Outside the sampler a batch may hold several levels; each is guided as if it were alone."""
    x = noise(3)
    alpha, sigma = torch.tensor([0.9, 0.6, 0.3]).double(), torch.tensor([0.4, 0.8, 0.95]).double()
    denoiser = GaussianDenoiser(0.0, 1.0)
    guidance = EnergyGuidance(energy).within(0.0, 2.0)
    level = Level(alpha, sigma, 0)
    together = guidance(State(x, level, [level]), lambda *, grad=False: denoiser(x, level)).eps
    for i in range(3):
        alone = Level(alpha[i].item(), sigma[i].item(), 0)
        state, bare = State(x[i : i + 1], alone, [alone]), denoiser(x[i : i + 1], alone)
        torch.testing.assert_close(guidance(state, lambda *, grad=False, bare=bare: bare).eps[0], together[i])
    assert torch.equal(together[2], denoiser(x, level).eps[2])
