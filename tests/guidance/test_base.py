"""Composition of guidances, the three sites, and what must not change: T11 of the guidance spec."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from genkit.denoisers.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from genkit.guidance import EnergyGuidance, Guidance, State
from genkit.guidance.base import differentiate
from genkit.levels import Level
from genkit.sampling import sample

STEPS = 8
ROUTES = ("direct", "x0_detached", "through_denoiser")
SCHEDULERS = (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler)


class Pull(Guidance):
    """Score shift strength * (target - x0), and a record of when it was asked."""

    name = "pull"

    def __init__(self, target: float, strength: float = 0.1) -> None:
        self.target, self.strength, self.asked = target, strength, []

    def shift(self, state, prediction):
        self.asked.append(state.level.index)
        return self.strength * (self.target - prediction.x0)


class Push(Guidance):
    """Displaces by a constant before the denoiser and after the step."""

    def __init__(self, before: float = 0.0, after: float = 0.0) -> None:
        self.by = before, after

    def before(self, state):
        return state.x + self.by[0]

    def after(self, state, x_next):
        return x_next + self.by[1]


def scheduler(cls=DDIMScheduler, n=STEPS):
    made = cls(**({"clip_sample": False} if cls is DDIMScheduler else {}))
    made.set_timesteps(n)
    return made


def noise(count=4, dtype=torch.float64):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


class Run:
    """A sampling run of a mixture, and how often it evaluated its network, and with a graph."""

    def __init__(self, guidance=None, x=None, cls=DDIMScheduler, on_step=None, **arguments) -> None:
        denoiser = GaussianMixtureDenoiser([-1.0, 1.0], 0.5)
        self.calls = self.graphs = 0
        denoiser.network.register_forward_hook(self._count)
        x = noise() if x is None else x
        self.out = sample(denoiser, scheduler(cls), x, guidance=guidance, on_step=on_step, **arguments)

    def _count(self, module, inputs, output) -> None:
        self.calls += 1
        self.graphs += output[0].requires_grad


def energy(x):
    return -(x - 0.3).square().flatten(1).sum(1)


def of(route: str, scale: float = 1.0) -> EnergyGuidance:
    return EnergyGuidance(energy, scale, route)


# Weight zero


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(), 0.0 * Pull(2.0), 0 * (Pull(2.0) + Push(1.0, 1.0)), 0.0 * Push(3.0, 4.0), Pull(2.0).scheduled(lambda state: 0.0),
        0.0 * Pull(2.0) + 0.0 * Push(1.0), *[of(route, 0.0) for route in ROUTES], *[0.0 * of(route) for route in ROUTES],
    ],
)  # fmt: skip
def test_weight_zero_changes_no_bit_and_costs_nothing(cls, guidance):
    bare, guided = Run(cls=cls), Run(guidance, cls=cls)
    assert torch.equal(bare.out, guided.out)
    assert (guided.calls, guided.graphs) == (bare.calls, 0)


@pytest.mark.parametrize("route", ROUTES)
def test_guidance_costs_no_extra_network_call(route):
    guided = Run(of(route))
    assert guided.calls == STEPS
    assert guided.graphs == (STEPS if route == "through_denoiser" else 0)
    assert not guided.out.requires_grad
    assert not torch.equal(guided.out, Run().out)


def test_a_sum_shares_one_network_call():
    assert Run(of("direct") + of("through_denoiser") + Pull(1.0)).calls == STEPS


# Invariances


@pytest.mark.parametrize("cls", SCHEDULERS)
@pytest.mark.parametrize("route", ROUTES)
def test_splitting_the_batch(cls, route):
    x = noise(5)
    together = Run(of(route), x, cls).out
    apart = torch.cat([Run(of(route), part, cls).out for part in (x[:2], x[2:3], x[3:])])
    torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)


def test_permuting_the_batch():
    x, order = noise(5), [3, 1, 4, 0, 2]
    torch.testing.assert_close(Run(of("direct"), x[order]).out, Run(of("direct"), x).out[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_the_order_of_a_sum_does_not_matter(route):
    a, b = of(route, 0.5), Pull(-2.0) + Push(0.01, -0.02)
    torch.testing.assert_close(Run(a + b).out, Run(b + a).out, rtol=1e-12, atol=1e-12)


def test_shifts_of_a_sum_come_from_the_same_prediction():
    state = State(noise(2), Level(0.8, 0.6, 0), [Level(0.8, 0.6, 0)])
    denoiser = GaussianDenoiser(0.0, 1.0)
    predict = lambda *, grad=False: denoiser(state.x.requires_grad_(grad), state.level)  # noqa: E731
    bare = predict()
    a, b = Pull(2.0), Pull(-5.0, 0.7)
    together = (a + b)(state, predict)
    torch.testing.assert_close(together.score - bare.score, a.shift(state, bare) + b.shift(state, bare))
    nested = (0.5 * a + (b + 2.0 * a))(state, predict)
    torch.testing.assert_close(nested.score - bare.score, 2.5 * a.shift(state, bare) + b.shift(state, bare))


def test_weights_multiply():
    torch.testing.assert_close(Run(2.0 * (3.0 * Pull(1.0, 0.01))).out, Run(Pull(1.0, 0.06)).out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Run(Pull(1.0, 0.1) * 0.5).out, Run(Pull(1.0, 0.05)).out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Run(2.0 * (Pull(1.0) + Pull(0.5))).out, Run(2.0 * Pull(1.0) + 2.0 * Pull(0.5)).out)


@pytest.mark.parametrize("outer", [lambda total: 2.0 * total, lambda total: total.between(0, 1)])
def test_a_weighted_sum_may_differentiate_through_the_denoiser(outer):
    assert Run(outer(of("through_denoiser") + Pull(1.0))).graphs == STEPS


@pytest.mark.parametrize("compose", [lambda a: 2.0 * a, lambda a: a + Pull(1.0)])
def test_a_guidance_that_overrides_call_is_not_dropped_silently(compose):
    class Own(Guidance):
        def __call__(self, state, predict):
            prediction = predict()
            return prediction.shifted(prediction.x)

    assert not torch.equal(Run(compose(Own())).out, Run(compose(Guidance())).out)


# Schedules


@pytest.mark.parametrize(("start", "stop", "expected"), [(0.0, 1.0, range(8)), (0.2, 0.8, range(2, 6)), (0, 0, [0]), (1, 1, [7])])
def test_between(start, stop, expected):
    pull = Pull(1.0)
    Run(pull.between(start, stop))
    assert pull.asked == list(expected)


def test_between_counts_evaluations_of_second_order_samplers():
    """diffusers' guiders compare an evaluation's index with the number of steps, and stop half way through a Heun run."""
    pull = Pull(1.0)
    Run(pull.between(0.5, 1.0), cls=HeunDiscreteScheduler)
    assert pull.asked == list(range(7, 15))


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 1.1), (0.8, 0.2)])
def test_between_refuses(interval):
    with pytest.raises(ValueError, match=r"between\("):
        Pull(1.0).between(*interval)


def test_gated_composition():
    early, late = Pull(1.0), Pull(-1.0)
    Run(early.between(0, 0.4) + 0.5 * late.between(0.6, 1))
    assert early.asked == [0, 1, 2]
    assert late.asked == [5, 6, 7]


# Sites


def test_before_moves_the_sample_that_is_denoised():
    seen = []

    def on_step(state, prediction, x_next):
        seen.append((state.x, prediction.x))

    x = noise()
    Run(Push(before=0.25).between(0, 0), x, on_step=on_step)
    assert torch.equal(seen[0][0], x + 0.25)
    assert all(torch.equal(state_x, predicted_x) for state_x, predicted_x in seen)


def test_after_moves_the_sample_that_comes_next():
    bare, moved = [], []
    Run(on_step=lambda state, prediction, x_next: bare.append(x_next))
    Run(Push(after=0.25).between(0, 0), on_step=lambda state, prediction, x_next: moved.append(x_next))
    torch.testing.assert_close(moved[0], bare[0] + 0.25)


def test_displacements_add_and_weigh():
    level = Level(0.8, 0.6, 0)
    state = State(noise(2), level, [level])
    both = 2.0 * Push(0.1, 1.0) + Push(0.3, -0.5)
    torch.testing.assert_close(both.before(state), state.x + 0.5)
    torch.testing.assert_close(both.after(state, state.x), state.x + 1.5)
    assert Guidance().before(state) is state.x
    assert (Guidance() + Guidance()).before(state) is state.x


# State


def test_state_of_a_run():
    states = []

    class Look(Guidance):
        def shift(self, state, prediction):
            states.append((state.progress, state.seeds, len(state.levels), state.scheduler, state.cache))
            state.log["seen"] = torch.zeros(4)
            state.cache["n"] = state.cache.get("n", 0) + 1

    logs = []
    Run(Look(), seeds=[5, 6, 7, 8], on_step=lambda state, prediction, x_next: logs.append(dict(state.log)))
    assert [progress for progress, *_ in states] == pytest.approx([i / 7 for i in range(8)])
    assert states[0][1:3] == ([5, 6, 7, 8], STEPS)
    assert isinstance(states[0][3], DDIMScheduler)
    assert states[-1][4]["n"] == STEPS
    assert all(list(log) == ["seen"] for log in logs)


def test_names():
    assert (Pull(1.0) + of("direct")).name == "pull + energy"
    assert (2.0 * Pull(1.0)).name == "pull"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_differentiate(mode):
    with mode():
        x = noise(3)
        value, gradient = differentiate(energy, x)
        assert not value.requires_grad
        torch.testing.assert_close(gradient, -2 * (x - 0.3))
        assert not x.requires_grad


@pytest.mark.parametrize("route", ROUTES)
def test_under_no_grad(route):
    expected = Run(of(route)).out
    with torch.no_grad():
        assert torch.equal(Run(of(route)).out, expected)
