"""Levels against every scheduler family: what diffusers itself takes x0 to be, at every evaluation of a run."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
)

from genkit import _host
from genkit.levels import Level, broadcast, kind_of, levels_of
from genkit.prediction import Prediction
from tests.schedulers import CASES, Case, noise_of

STEPS = 10


def raw_prediction(scheduler, x, level, raw) -> Prediction:
    """A prediction from a network output, as a denoiser makes it."""
    if _host.is_preconditioned(scheduler):
        raw = scheduler.precondition_outputs(x, raw, level.sigma)
    return Prediction(x, level, raw, kind_of(scheduler))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_x0_is_the_hosts(case: Case):
    scheduler, generator = case.make(STEPS), torch.Generator().manual_seed(0)
    _host.begin(scheduler)
    levels = levels_of(scheduler)
    x = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) * levels[0].sigma
    with noise_of(scheduler, lambda shape: torch.randn(shape, generator=generator)):
        for level, t in zip(levels, scheduler.timesteps, strict=True):
            assert level.t == t.item()
            raw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            prediction = raw_prediction(scheduler, x, level, raw)
            x_next, what, expected = case.read(scheduler, raw, t, x, level.index)
            got = getattr(prediction, what)
            scale = max(1.0, float(x.abs().max()), float(expected.abs().max())) / min(1.0, level.alpha or 1.0)
            assert (got - expected).abs().max() < 1e-5 * scale, f"evaluation {level.index} of {len(levels)}"
            x = x_next.double()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_levels_go_down(case: Case):
    scheduler = case.make(STEPS)
    levels = levels_of(scheduler)
    assert [level.index for level in levels] == list(range(len(scheduler.timesteps)))
    ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in levels]
    assert all(math.isfinite(level.alpha) and level.sigma > 0 for level in levels)
    if not case.name.startswith("pndm"):  # PNDM evaluates some timesteps twice, out of order
        first = [ratio for ratio, level in zip(ratios, levels, strict=True) if level.order == 1]
        assert all(b < a for a, b in itertools.pairwise(first))
        assert all(b < a for a, b, level in zip(ratios, ratios[1:], levels[1:], strict=False) if level.order == 2)
    expected = [1 + i % 2 for i in range(len(levels))] if _host.is_second_order(scheduler) else [1] * len(levels)
    assert [level.order for level in levels] == expected


def test_float64_inside():
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(50)
    last = levels_of(scheduler)[-1]
    # 1 - abar of the first timestep is 8.5e-4; in float32 the square root would be right to 1e-5 only.
    assert last.sigma**2 == pytest.approx(1 - float(scheduler.alphas_cumprod[0]), rel=1e-12)
    assert last.alpha**2 + last.sigma**2 == pytest.approx(1, abs=1e-15)


def test_karras_levels_do_not_come_from_the_rounded_timestep():
    scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    abar = [scheduler.alphas_cumprod[int(t)] for t in scheduler.timesteps]
    levels = levels_of(scheduler)
    assert [level.sigma / level.alpha for level in levels] == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-9)
    assert max(abs(level.alpha - a.sqrt().item()) for level, a in zip(levels, abar, strict=True)) > 1e-4


def test_stable_diffusion_pndm_evaluates_one_more():
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(30)
    levels = levels_of(scheduler)
    assert len(levels) == 31
    assert [level.t for level in levels[-2:]] == [34, 1]


def test_ddpm_with_custom_timesteps():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[900, 500, 3])
    assert [level.t for level in levels_of(scheduler)] == [900, 500, 3]


def test_not_ready():
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()):
        with pytest.raises(ValueError, match="set_timesteps"):
            levels_of(scheduler)


@pytest.mark.parametrize("cls", [CMStochasticIterativeScheduler, IPNDMScheduler])
def test_unknown_families_are_refused(cls):
    scheduler = cls()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=f"{cls.__name__} is not supported"):
        levels_of(scheduler)


def test_inverted_flow_is_refused():
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="invert_sigmas"):
        levels_of(scheduler)


def test_kinds():
    assert kind_of(FlowMatchEulerDiscreteScheduler()) == "flow"
    assert kind_of(HeunDiscreteScheduler(prediction_type="v_prediction")) == "v"
    assert kind_of(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)) == "flow"
    with pytest.raises(ValueError, match="Unknown prediction_type 'noise'"):
        kind_of(DDIMScheduler(prediction_type="noise"))
    for prediction_type, flow in (("v_prediction", True), ("flow_prediction", False)):
        with pytest.raises(ValueError, match="does not go with"):
            kind_of(DPMSolverMultistepScheduler(prediction_type=prediction_type, use_flow_sigmas=flow))


def test_level_arithmetic():
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    single = Level(0.6, 0.8, 0)
    assert single.norm == pytest.approx(1)
    torch.testing.assert_close(single.diffuse(x0, eps), 0.6 * x0 + 0.8 * eps)
    several = Level(torch.tensor([0.6, 1.0]).double(), torch.tensor([0.8, 5.0]).double(), torch.tensor([1, 2]))
    torch.testing.assert_close(several.diffuse(x0, eps)[1], x0[1] + 5 * eps[1])
    torch.testing.assert_close(several.norm, torch.tensor([1.0, math.sqrt(26)], dtype=torch.float64))
    assert broadcast(several.sigma, x0.float()).dtype == torch.float32
    assert broadcast(several.sigma, x0).shape == (2, 1, 1, 1)
    assert broadcast(2.0, x0) == 2.0
