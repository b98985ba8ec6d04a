"""Recurrence: re-noising is exact, one time is none, the distribution stays right, the scheduler is not disturbed."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from genkit.denoisers.analytic import GaussianDenoiser
from genkit.guidance import EnergyGuidance, Guidance, Recurrent
from genkit.guidance.recurrence import renoise
from genkit.levels import Level, kind_of
from genkit.sampling import sample
from tests.oracles import MODEL, REAL, gaussian_log_density

VP = {"clip_sample": False}
SCHEDULERS = [
    (DDIMScheduler, VP),
    (DDPMScheduler, VP),
    (EulerDiscreteScheduler, {}),
    (EulerAncestralDiscreteScheduler, {}),
    (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    (HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    (PNDMScheduler, {"skip_prk_steps": False, "set_alpha_to_one": True}),
    (LMSDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverSinglestepScheduler, {}),
    (UniPCMultistepScheduler, {}),
]


def log_ratio(x, level):
    """log p_data / p_model at any level: the exact guidance of setting G."""
    densities = [gaussian_log_density(x, level.alpha, level.sigma, *who) for who in (REAL, MODEL)]
    return (densities[0] - densities[1]).sum(1)


EXACT = EnergyGuidance(log_ratio, 1.0, "direct")


def run(guidance, cls=DDIMScheduler, config=VP, *, steps=10, count=4, seeds=None, x=None, on_step=None):
    """(samples, how often the network was evaluated)."""
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    denoiser = GaussianDenoiser(*MODEL, kind=kind_of(scheduler))
    calls = []
    denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    if x is None:
        x = torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    return sample(denoiser, scheduler, x, guidance=guidance, seeds=seeds, on_step=on_step), len(calls)


@pytest.mark.parametrize(
    ("level", "following"),
    [
        (Level(0.6, 0.8, 0), Level(0.8, 0.6, 0)),
        (Level(1.0, 3.0, 0), Level(1.0, 1.0, 0)),
        (Level(0.3, 0.7, 0), Level(0.8, 0.2, 0)),
        (Level(0.6, 0.8, 0), Level(1.0, 0.0, 0)),
        (Level(0.0, 1.0, 0), Level(0.5, 0.5, 0)),
        (Level(0.6, 0.8, 0), Level(0.6, 0.8, 0)),
    ],
)
def test_renoising_gives_samples_of_the_level(level, following):
    g = torch.Generator().manual_seed(0)
    x0, eps = 2.0, torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    x = renoise(following.diffuse(torch.full_like(eps, x0), eps), following, level, g)
    assert x.mean().item() == pytest.approx(level.alpha * x0, abs=0.02 * level.sigma)
    assert x.std().item() == pytest.approx(level.sigma, rel=0.01)


def test_renoising_with_a_level_for_each_sample():
    here, there = (Level(torch.tensor(a), torch.tensor(s), 0) for a, s in (([0.6, 1.0], [0.8, 3.0]), ([0.8, 1.0], [0.6, 1.0])))
    x = torch.ones(2, 1)
    together = renoise(x, there, here, [torch.Generator().manual_seed(i) for i in range(2)])
    for i, (level, following) in enumerate([(Level(0.6, 0.8, 0), Level(0.8, 0.6, 0)), (Level(1.0, 3.0, 0), Level(1.0, 1.0, 0))]):
        torch.testing.assert_close(together[i], renoise(x[:1], following, level, torch.Generator().manual_seed(i))[0])


@pytest.mark.parametrize(("cls", "config"), SCHEDULERS)
def test_once_is_no_recurrence(cls, config):
    for guidance in (EXACT, Guidance()):
        torch.manual_seed(0)
        plain, calls = run(guidance, cls, config)
        torch.manual_seed(0)
        once, calls_once = run(guidance.recurrent(1), cls, config)
        assert torch.equal(once, plain)
        assert calls_once == calls


@pytest.mark.parametrize(("cls", "config"), SCHEDULERS)
def test_exact_guidance_stays_exact(cls, config):
    """The target is N(1, 0.5^2). First-order steps come out somewhat narrow, with or without recurrence."""
    torch.manual_seed(0)
    out, calls = run(EXACT.recurrent(3), cls, config, steps=60, count=4000, x=torch.randn(4000, 1, dtype=torch.float64))
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert out.std().item() == pytest.approx(0.5, abs=0.08)
    assert calls > 2 * 60


def test_it_mends_what_the_start_got_wrong():
    """Samples forget where they came from: recurrence pulls a wrong start to the target, which is what it is for."""
    x = torch.full((4000, 1), 3.0, dtype=torch.float64)
    once, often = (run(EXACT.recurrent(times), x=x)[0].mean().item() for times in (1, 6))
    assert abs(often - 1.0) < abs(once - 1.0) / 3


@pytest.mark.parametrize(("cls", "config"), SCHEDULERS)
def test_the_scheduler_is_not_disturbed(cls, config):
    """The extra steps leave no trace in the scheduler, except that extrapolation from earlier predictions restarts."""
    scheduler = cls(**config)
    scheduler.set_timesteps(6)
    before = []

    class Look(Guidance):
        def shift(self, state, prediction):
            before.append(copy.deepcopy(state.scheduler.__dict__))
            return 0.1 * prediction.x

    sample(GaussianDenoiser(*MODEL, kind=kind_of(scheduler)), scheduler, torch.ones(2, 1).double(), guidance=Look().recurrent(3))
    by_index = {}
    for state in before:
        by_index.setdefault(state["_step_index"] if "_step_index" in state else state.get("counter", len(by_index)), []).append(
            state
        )
    ours = ("lower_order_nums", "last_sample")
    for states in by_index.values():
        for state in states[1:]:
            assert all(_same(value, states[0][key]) for key, value in state.items() if key not in ours)


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b if not hasattr(a, "tolist") else a.tolist() == b.tolist())


@pytest.mark.parametrize(
    ("cls", "config", "steps", "calls"),
    [
        (DDIMScheduler, VP, 6, 6 * 3),
        (HeunDiscreteScheduler, {}, 6, 6 * 3 + 5),  # first stages three times, second stages once
        (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}, 6, 6 * 3 + 1),  # its first step has two stages
        (PNDMScheduler, {"skip_prk_steps": True}, 6, 5 * 3 + 2),  # its last step stays at the same level
        (PNDMScheduler, {"skip_prk_steps": False, "set_alpha_to_one": True}, 6, 3 * (3 + 3) + 3 * 3),  # three steps of four stages
        (DPMSolverSinglestepScheduler, {}, 6, 4 * 3 + 2),  # orders 1 2 1 2 1 1
    ],
)
def test_only_first_stages_are_repeated(cls, config, steps, calls):
    assert run(EXACT.recurrent(3), cls, config, steps=steps)[1] == calls


def test_the_window():
    class Count(Guidance):
        def __init__(self):
            self.asked = []

        def shift(self, state, prediction):
            self.asked.append(state.level.index)

    count = Count()
    run(count.recurrent(3, 0.2, 0.6), steps=6)
    assert count.asked == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5]
    count = Count()
    run(count.between(0.5, 1).recurrent(2), steps=6)
    assert count.asked == [3, 3, 4, 4, 5, 5]


def test_the_step_is_taken_from_the_new_sample():
    seen = []
    run(EXACT.recurrent(3), on_step=lambda state, prediction, x_next: seen.append((state.x, prediction.x)))
    assert all(torch.equal(a, b) for a, b in seen)


@pytest.mark.parametrize("weight", [0.0, lambda state: torch.zeros(4)])
def test_weight_zero_costs_nothing(weight):
    guidance = EXACT.scheduled(weight) if callable(weight) else weight * EXACT
    plain, calls = run(None)
    guided, guided_calls = run(guidance.recurrent(4))
    assert torch.equal(plain, guided)
    assert calls == guided_calls


def test_displacements_are_repeated_too():
    class Count(Guidance):
        def __init__(self):
            self.sites = []

        def before(self, state):
            self.sites.append("x")
            return state.x

        def shift(self, state, prediction):
            self.sites.append("s")

        def after(self, state, x_next):
            self.sites.append("m")
            return x_next

    count = Count()
    run(count.recurrent(2), steps=2)
    assert "".join(count.sites) == "xsmxsm" * 2


@pytest.mark.parametrize(("cls", "config"), [(DDIMScheduler, VP), (DDPMScheduler, VP), (EulerAncestralDiscreteScheduler, {})])
def test_the_noise_is_a_function_of_the_seed(cls, config):
    gate = EXACT.scheduled(lambda state: (state.x[:, 0] > 0).double()).recurrent(3)
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler_noise = DDIMScheduler is not cls
    for guidance in (EXACT.recurrent(3), gate):
        torch.manual_seed(1)
        together = _with_seeds(guidance, cls, config, x, [3, 4, 5, 6])
        apart = torch.cat([_with_seeds(guidance, cls, config, x[i : i + 1], [3 + i]) for i in range(4)])
        torch.testing.assert_close(apart, together, rtol=1e-12, atol=1e-12)
        assert not torch.equal(together, _with_seeds(guidance, cls, config, x, [7, 4, 5, 6])) or scheduler_noise


def _with_seeds(guidance, cls, config, x, seeds):
    from genkit import noise

    scheduler = cls(**config)
    scheduler.set_timesteps(8)
    x = x * float(scheduler.init_noise_sigma)
    generators = noise.generators(seeds, noise.SAMPLER)
    return sample(GaussianDenoiser(*MODEL), scheduler, x, guidance=guidance, seeds=seeds, generator=generators)


def test_gated_samples_are_not_renoised():
    gate = torch.tensor([1.0, 0.0, 1.0, 0.0])
    plain, guided = run(None)[0], run(EXACT.scheduled(lambda state: gate).recurrent(3))[0]
    assert torch.equal(plain[gate == 0], guided[gate == 0])
    assert not torch.equal(plain[gate == 1], guided[gate == 1])


def test_it_must_be_outermost():
    recurrent = EXACT.recurrent(2)
    for wrong in (lambda: recurrent + EXACT, lambda: EXACT + recurrent, lambda: 2.0 * recurrent, lambda: recurrent.between(0, 1)):
        with pytest.raises(ValueError, match=r"Compose first, then repeat"):
            wrong()
    with pytest.raises(ValueError, match="recurrent already"):
        recurrent.recurrent(2)
    assert (EXACT + EXACT).recurrent(2).name == "energy + energy"


@pytest.mark.parametrize("times", [0, -1, 1.5, True, "2"])
def test_bad_times(times):
    with pytest.raises(ValueError, match="whole number"):
        Recurrent(EXACT, times)


def test_bad_window_and_differentiation():
    with pytest.raises(ValueError, match="between"):
        EXACT.recurrent(2, 0.8, 0.2)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        run(EXACT.recurrent(2), x=torch.ones(2, 1, dtype=torch.float64, requires_grad=True))
