"""Noise levels by fraction of the training time, and the few-step sampler."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from genkit.distill.path import Path, renoise, steps_of
from genkit.levels import Level
from tests.tiny import SCHEDULE

EVEN = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(**SCHEDULE),
        diffusers.PNDMScheduler(**SCHEDULE),
        diffusers.DPMSolverMultistepScheduler(**SCHEDULE),
        diffusers.EulerDiscreteScheduler(**SCHEDULE),
    ],
)
def test_variance_preserving_levels_are_those_of_the_timesteps(scheduler):
    level = Path(scheduler).level(EVEN)
    t = torch.tensor([999, 749, 499, 249])
    assert torch.equal(torch.as_tensor(level.t).round().long(), t)
    alphas = scheduler.alphas_cumprod[t].double()
    norm = torch.as_tensor(level.norm)
    assert torch.allclose(torch.as_tensor(level.alpha) / norm, alphas.sqrt(), atol=1e-6)
    assert torch.allclose(torch.as_tensor(level.sigma) / norm, (1 - alphas).sqrt(), atol=1e-6)


def test_a_fraction_is_a_timestep_whatever_their_number():
    """t = ceil(u T) - 1, also where u T is no exact float: .3 * 10 is 3 and not a little more."""
    for count in (4, 10, 1000):
        path = Path(diffusers.DDPMScheduler(num_train_timesteps=count))
        u = torch.tensor([(t + 1) / count for t in range(count)], dtype=torch.float64)
        assert torch.equal(torch.as_tensor(path.level(u).t).round().long(), torch.arange(count))
    assert float(torch.as_tensor(Path(diffusers.DDPMScheduler()).level(1e-9).t)) == 0


def test_flow_levels_are_the_fractions_whatever_the_shift():
    for scheduler in (
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ):
        level = Path(scheduler).level(EVEN)
        assert torch.allclose(torch.as_tensor(level.sigma), EVEN)
        assert torch.allclose(torch.as_tensor(level.alpha), 1 - EVEN)
        assert torch.allclose(torch.as_tensor(level.t), 1000 * EVEN)


def test_edm_levels_span_its_sigmas():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=100.0)
    sigma = torch.as_tensor(Path(scheduler).level([1.0, 0.5, 1e-6]).sigma)
    assert torch.allclose(sigma, torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64), rtol=1e-3)


def test_the_first_level_is_pure_noise_and_the_network_is_told_the_last_timestep():
    path = Path(diffusers.DDPMScheduler(**SCHEDULE))
    x0, eps = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    x, level = path.add_noise(x0, eps, EVEN)
    assert torch.equal(x[0], eps[0])
    alpha = math.sqrt(float(path.scheduler.alphas_cumprod[999]))
    assert alpha > 0.06
    assert float(torch.as_tensor(level.alpha)[0]) == pytest.approx(alpha, rel=1e-5)
    a, s = (torch.as_tensor(v)[1:].float().view(-1, 1, 1, 1) for v in (level.alpha, level.sigma))
    assert torch.allclose(x[1:], a * x0[1:] + s * eps[1:], atol=1e-6)


def test_noise_of_sigma_space_starts_where_its_samplers_do():
    """EDM's samplers start at sqrt(sigma_max^2 + 1) eps."""
    scheduler = diffusers.EDMEulerScheduler()
    eps = torch.ones(1, 1, 1, 1)
    x, _ = Path(scheduler).add_noise(5 * eps, eps, torch.tensor([1.0]))
    assert float(x) == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-5)


@pytest.mark.parametrize("u", [0.0, -0.1, 1.01, math.inf])
def test_fractions_out_of_range(u):
    with pytest.raises(ValueError, match=r"Levels are fractions of the training time, above 0 and at most 1"):
        Path(diffusers.DDPMScheduler()).level(u)


def test_levels_of_fewer_steps():
    levels = (1.0, 0.75, 0.5, 0.25)
    assert steps_of(levels, 1) == (1.0,)
    assert steps_of(levels, 2) == (1.0, 0.5)
    assert steps_of(levels, 3) == (1.0, 0.75, 0.5)
    assert steps_of(levels, 4) == levels
    for count in (0, 5):
        with pytest.raises(ValueError, match=rf"A student of 4 levels samples in 1 to 4 steps, not {count}\."):
            steps_of(levels, count)


def test_renoising_denoises_then_adds_fresh_noise_of_the_next_level():
    path = Path(diffusers.FlowMatchEulerDiscreteScheduler())
    eps = [torch.full((1, 2), value) for value in (3.0, 5.0)]
    seen: list[tuple[torch.Tensor, float]] = []

    def x0_of(x: torch.Tensor, level: Level) -> torch.Tensor:
        seen.append((x, float(torch.as_tensor(level.sigma))))
        return torch.full_like(x, 10.0 * len(seen))

    result = renoise(x0_of, path, (1.0, 0.25), lambda step: eps[step])
    assert torch.equal(result, torch.full((1, 2), 20.0))
    assert [sigma for _, sigma in seen] == [1.0, 0.25]
    assert torch.equal(seen[0][0], eps[0])
    assert torch.allclose(seen[1][0], 0.75 * 10.0 + 0.25 * eps[1])
