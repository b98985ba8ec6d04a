"""Few-step schedules: specs, the levels that schedulers visit, and the step from one level to the next in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from genkit.denoisers import Denoiser
from genkit.distill import FewStepSpec
from genkit.distill.path import Path as Levels
from genkit.distill.schedule import as_arguments, sample_levels, scheduler_for, set_levels, visits
from genkit.distill.spec import FILE
from genkit.levels import broadcast, levels_of
from tests import tiny

EVEN = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 10])
def test_lcm_visits_even_levels_by_number_of_steps(count: int) -> None:
    """The stock call then needs no timesteps, whatever the number of steps."""
    levels = tuple((count - i) / count for i in range(count))
    spec = FewStepSpec(method="ladd", levels=levels)
    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    scheduler = scheduler_for(denoiser.pipe.scheduler, levels)
    for steps in range(1, count + 1):
        assert set_levels(spec, denoiser, scheduler, steps, (4, 8, 8)) == {}
        assert visits(scheduler, spec.visited(steps))


@pytest.mark.parametrize(
    ("family", "levels", "steps", "custom"),
    [
        ("stable_diffusion", (1, 0.6, 0.3), 2, {"timesteps": [999, 599]}),
        ("stable_diffusion", (1, 2 / 3, 1 / 3), 3, {}),  # 3 does not divide 1000, so LCM may not count in thirds
        ("sd3", EVEN, 1, {}),
        ("sd3", EVEN, 2, {"sigmas": [1.0, 0.5]}),  # its default ends at .001
        ("sana", EVEN, 4, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
        ("flux", EVEN, 4, {}),  # its pipeline passes even sigmas itself
        ("flux", EVEN, 3, {"sigmas": [1.0, 0.75, 0.5]}),
    ],
)
def test_what_a_call_needs(family: str, levels: tuple[float, ...], steps: int, custom: dict) -> None:
    spec, denoiser = FewStepSpec(method="ladd", levels=levels), Denoiser.of(tiny.pipeline(family))
    scheduler = scheduler_for(denoiser.pipe.scheduler, levels)
    assert set_levels(spec, denoiser, scheduler, steps, (4, 8, 8)) == custom
    assert spec.schedule(steps, scheduler) == as_arguments(scheduler, spec.visited(steps))


def test_sigmas_are_given_before_the_shift() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(**as_arguments(scheduler, EVEN))
    assert [level.sigma for level in levels_of(scheduler)] == pytest.approx(EVEN, abs=1e-6)
    scheduler.set_timesteps(sigmas=list(EVEN))
    assert not visits(scheduler, EVEN)
    assert not visits(scheduler, EVEN[:3])


def test_the_schedulers_keep_noise_schedule_and_prediction_but_not_the_spacing() -> None:
    own = diffusers.EulerDiscreteScheduler(
        beta_start=0.001, beta_end=0.02, prediction_type="v_prediction", timestep_spacing="leading", use_karras_sigmas=True
    )
    for sampler in ("renoise", "posterior", "ode"):
        scheduler = scheduler_for(own, EVEN, sampler)
        assert torch.equal(scheduler.alphas_cumprod, own.alphas_cumprod)
        assert scheduler.config.prediction_type == "v_prediction"
        scheduler.set_timesteps(4)
        assert visits(scheduler, EVEN)
    clipping = scheduler_for(diffusers.DDPMScheduler(clip_sample=True, thresholding=True), EVEN)
    assert not clipping.config.clip_sample
    assert not clipping.config.thresholding


# What share of the old noise each step keeps; renoise keeps none.
KEPT = {"renoise": (0.0, 0.0, 0.0), "posterior": (0.279, 0.395, 0.430), "ode": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("sampler", list(KEPT))
def test_the_step_from_level_to_level(sampler: str) -> None:
    """A student that always says x0 = 1: what it sees is linear in the noise, with the coefficients of the equation."""
    path = Levels(diffusers.DDIMScheduler(**tiny.SCHEDULE))
    noise = torch.eye(4).reshape(4, 1, 4).double()  # the noise of each step in a coordinate of its own
    seen = []

    def x0_of(x: torch.Tensor, level) -> torch.Tensor:
        seen.append(((x - broadcast(level.alpha, x) * torch.ones_like(x)) / broadcast(level.sigma, x)).flatten())
        return torch.ones_like(x)

    sample_levels(x0_of, path, EVEN, noise.__getitem__, sampler)
    for step, kept in enumerate(KEPT[sampler], 1):
        previous = seen[step - 1]
        expected = kept * previous + (1 - kept**2) ** 0.5 * noise[step].flatten()
        assert seen[step] == pytest.approx(expected.numpy(), abs=6e-4)


def test_posterior_is_that_of_ddpm() -> None:
    """Ho et al. 2020, eq. 6 and 7, between two levels as if they were neighbours."""
    path = Levels(diffusers.DDIMScheduler(**tiny.SCHEDULE))
    before, here = path.level(0.75), path.level(0.5)
    seen = []

    def run(noise: torch.Tensor) -> torch.Tensor:
        sample_levels(lambda x, level: seen.append(x) or torch.full_like(x, 2.0), path, (0.75, 0.5), noise.__getitem__, "posterior")
        return seen[-1]

    zero = torch.zeros(2, 1, 1).double()
    one = zero.clone()
    one[1] = 1.0
    mean, std = run(zero), run(one) - run(zero)
    abar, abar_prev = float(before.alpha) ** 2, float(here.alpha) ** 2
    alpha, beta = abar / abar_prev, 1 - abar / abar_prev
    x = 0.0 * before.sigma  # the start without noise
    expected = abar_prev**0.5 * beta / (1 - abar) * 2.0 + alpha**0.5 * (1 - abar_prev) / (1 - abar) * x
    torch.testing.assert_close(mean.flatten(), expected)
    assert float(std) == pytest.approx((beta * (1 - abar_prev) / (1 - abar)) ** 0.5, rel=1e-9)


# The spec's file


def test_spec_round_trips(tmp_path: Path) -> None:
    spec = FewStepSpec(method="add", levels=[1, 0.5], guidance_scale=2.0, height=64, width=32, teacher="digits", steps=1)  # type: ignore[arg-type]
    spec.save(tmp_path)
    assert FewStepSpec.load(tmp_path) == spec
    assert spec.default_steps == 1
    assert FewStepSpec(method="add", levels=(1, 0.5)).default_steps == 2
    assert FewStepSpec.load(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"levels": ()}, r"levels must be fractions .* got \(\)"),
        ({"levels": (1, 1.5)}, "levels must be fractions"),
        ({"levels": (1, 0)}, "levels must be fractions"),
        ({"levels": (1, "half")}, "levels must be fractions"),
        ({"levels": (0.75, 0.5)}, "must descend from 1"),
        ({"levels": (1, 0.25, 0.5)}, "must descend from 1"),
        ({"method": 3}, "method must be text"),
        ({"sampler": "renoize"}, "Did you mean 'renoise'"),
        ({"guidance_scale": -1}, "guidance_scale must be a number from 0"),
        ({"height": 64}, "Give height and width together"),
        ({"height": 0, "width": 64}, "height must be a whole number from 1"),
        ({"steps": 3}, "steps must be a whole number from 1 to 2"),
        ({"steps": True}, "steps must be a whole number"),
    ],
)
def test_specs_that_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FewStepSpec(**({"method": "ladd", "levels": (1, 0.5)} | fields))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "does not say method and levels"),
        ('{"method": "ladd"}', "does not say method and levels"),
        ('{"method": "ladd", "levels": [1], "lr": 1}', "unknown entry 'lr'"),
        (json.dumps({"method": "ladd", "levels": [0.5]}), "cannot be used: levels must descend from 1"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        FewStepSpec.load(tmp_path)
    assert FILE in str(caught.value)
