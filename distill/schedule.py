"""How a few-step student goes from one of its levels to the next, and the diffusers scheduler that does it.

    x_s = alpha_s x0 + sigma_s (c e + sqrt(1 - c^2) z)        x0 the student's prediction at x_t, e = (x_t - alpha_t x0) / sigma_t

with fresh noise z, and c the share of the old noise that is kept:

| sampler   | c                                   | variance preserving          | flow matching                       |
|-----------|-------------------------------------|------------------------------|-------------------------------------|
| renoise   | 0, as training simulates it         | LCM                          | Euler with `stochastic_sampling`    |
| posterior | alpha_t sigma_s / (alpha_s sigma_t) | Euler ancestral, "trailing"  | (diffusers has none)                |
| ode       | 1                                   | Euler, "trailing"            | Euler                               |

(Luo et al. 2023, arXiv 2310.04378, algorithm 3; Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7; Song et al. 2021, arXiv 2010.02502.)

The Euler schedulers start a variance-preserving run from sigma_1 z, not z (0.998 z for Stable Diffusion): another difference from
training, besides c.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit import _host
from genkit.denoisers import Denoiser
from genkit.distill.path import Noise, Path, renoise
from genkit.distill.spec import FewStepSpec
from genkit.levels import Level, broadcast, levels_of


def is_flow(scheduler: Any) -> bool:
    """Whether the model was trained by flow matching, whatever scheduler it comes with."""
    return _host.is_flow(scheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def as_arguments(scheduler: Any, levels: Sequence[float]) -> dict[str, list[float]]:
    """Levels as `scheduler.set_timesteps` takes them: sigmas of a flow (before a shift), or timesteps."""
    level = Path(scheduler).level(levels)
    t = torch.as_tensor(level.t)
    if not is_flow(scheduler):
        return {"timesteps": [int(value) for value in t.tolist()]}
    sigma = torch.as_tensor(level.sigma)
    shift = 1.0 if scheduler.config.get("use_dynamic_shifting") else float(scheduler.config.get("shift") or 1.0)
    return {"sigmas": (sigma / (shift - (shift - 1) * sigma)).tolist()}


def visits(scheduler: Any, levels: Sequence[float]) -> bool:
    """Whether the scheduler, as its timesteps are set, evaluates the network at exactly these levels."""
    wanted, found = Path(scheduler).level(levels), levels_of(scheduler)
    if len(found) != len(levels):
        return False
    for i, level in enumerate(found):
        target = wanted[i]
        # The signal's share too: with a shift, custom timesteps and the sigmas that go with them need not agree.
        if abs(float(level.t) - float(target.t)) > 0.05 or abs(_signal(level) - _signal(target)) > 1e-4:
            return False
    return True


def set_levels(
    spec: FewStepSpec, denoiser: Denoiser, scheduler: Any, count: int, shape: Sequence[int], device: Any = None
) -> dict[str, list[float]]:
    """Set the scheduler to a student's levels, by number of steps where its own spacing meets them, else one by one.

    Args:
        shape: of a sample, (C, h, w).

    Returns:
        What `set_timesteps` needed beyond the number of steps: {}, {"timesteps": [...]} or {"sigmas": [...]}.

    Raises:
        ValueError: more steps than the student has levels, or a scheduler that cannot visit them.
    """
    levels = spec.visited(count)
    custom: dict[str, list[float]]
    for custom in ({}, as_arguments(scheduler, levels)):
        try:
            denoiser.set_timesteps(scheduler, count, shape, device, **custom)
        except ValueError:
            continue  # LCM refuses more steps than it has timesteps; others take no custom ones
        if visits(scheduler, levels):
            return custom
    listed = ", ".join(f"{u:g}" for u in levels)
    raise ValueError(
        f"{type(scheduler).__name__} does not visit the levels {listed} that this student was trained at. "
        "Use the scheduler that came with it."
    )


def scheduler_for(scheduler: Any, levels: Sequence[float], sampler: str = "renoise") -> Any:
    """The diffusers scheduler for a student, with the noise schedule and the prediction type of its teacher's.

    Args:
        scheduler: the teacher's.
        levels: the student's, from 1.
        sampler: "renoise", "posterior" or "ode".

    Raises:
        ValueError: the model is preconditioned (EDM), or diffusers has no such sampler for its kind.
    """
    import diffusers

    if _host.is_preconditioned(scheduler):
        raise ValueError(f"{type(scheduler).__name__} is of an EDM model, for which diffusers has no few-step scheduler.")
    if is_flow(scheduler):
        if sampler == "posterior":
            raise ValueError("diffusers has no posterior sampler for flow-matching models. Use renoise or ode.")
        # Levels are sigmas as the network sees them, so nothing is left to shift.
        return diffusers.FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps, shift=1.0, stochastic_sampling=sampler == "renoise"
        )
    if sampler == "renoise":
        count, steps = scheduler.config.num_train_timesteps, len(levels)
        even = count % steps == 0 and all(abs(u - (steps - i) / steps) < 1e-9 for i, u in enumerate(levels))
        # LCM takes its timesteps out of so many; with all of them, any custom ones pass without a warning.
        settings = {"original_inference_steps": steps if even else count, "clip_sample": False, "thresholding": False}
        return _like(scheduler, diffusers.LCMScheduler, settings)
    name = "EulerAncestralDiscreteScheduler" if sampler == "posterior" else "EulerDiscreteScheduler"
    return _like(scheduler, getattr(diffusers, name), {"timestep_spacing": "trailing"})


def sample_levels(
    x0_of: Callable[[Tensor, Level], Tensor], path: Path, levels: Sequence[float], noise: Noise, sampler: str = "renoise"
) -> Tensor:
    """A student's run through `levels`, without any scheduler of diffusers: what an export is held to.

    Args:
        x0_of: `(x (B, ...), level) -> x0`.
        noise: `step -> z (B, ...)`, that of the start first.

    Returns:
        Clean samples x0 (B, ...).
    """
    if sampler == "renoise":
        return renoise(x0_of, path, levels, noise)
    before = path.level(levels[0])
    x = before.diffuse(torch.zeros_like(noise(0)), noise(0))
    x0 = x0_of(x, before)
    for step, u in enumerate(levels[1:], 1):
        here = path.level(u)
        e = (x - broadcast(before.alpha, x) * x0) / broadcast(before.sigma, x)
        c = 1.0 if sampler == "ode" else float(before.alpha * here.sigma / (here.alpha * before.sigma))
        x = here.diffuse(x0, c * e + (1 - c**2) ** 0.5 * noise(step))
        x0, before = x0_of(x, here), here
    return x0


def _like(scheduler: Any, scheduler_class: Any, settings: dict[str, Any]) -> Any:
    """A scheduler with the noise schedule and the prediction type of another, but not its spacing."""
    known = set(inspect.signature(scheduler_class).parameters)
    kept = {k: v for k, v in scheduler.config.items() if k in known and not (k.startswith("use_") or k.startswith("original_"))}
    return scheduler_class(**(kept | settings))


def _signal(level: Level) -> float:
    return float(level.alpha / level.norm)
