"""Refinement of poses: denoise the assembly, fit each part rigidly to its denoised points, at falling noise levels.

    repeat for h in a falling schedule:   D = target(Y(g), h),   g_i = argmin sum_n |g_i x_in - D_in|^2       (Kabsch)

Each fit starts from the part in its own frame, never from where it was, so errors do not add up. What the target is (a template by
transport, a diffusion model, a scan) decides how good it is: see `genkit.assembly.couplings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkit.assembly.couplings import Target
from genkit.assembly.push import PushApartConfig, push_apart
from genkit.assembly.rigid import kabsch, pose_matrix, transform


def annealed(h_range: tuple[float, float] = (0.5, 0.01), steps: int = 60) -> list[float]:
    """Noise levels h = sigma / alpha in a geometric series from the first to the second, then a fifth of the steps at 0.02.

    Raises:
        ValueError: levels that are not positive, or no steps.
    """
    high, low = h_range
    if not (high > 0 and low > 0) or steps < 1:
        raise ValueError(f"h_range={h_range} must be positive, and steps={steps} at least 1.")
    last = steps // 5
    falling = steps - last
    series = [high * (low / high) ** (i / max(1, falling - 1)) for i in range(falling)]
    return series + [min(0.02, high)] * last


def refine(
    x: Tensor,
    poses: Tensor,
    target: Target,
    levels: Sequence[float],
    *,
    push: PushApartConfig | None = None,
    chunk: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Refined poses (H, P, 4, 4).

    Args:
        x: points of the parts (P, N, 3), in their frames.
        poses: to start from (H, P, 4, 4).
        target: gives each point its place; points (H, P * N, 3), parts one after the other.
        levels: h of each step, as `annealed` gives them.
        push: parts that overlap are pushed apart after each step, ever less over the last third.
        chunk: assemblies at a time; the result does not depend on it unless the target's noise does.
        on_step: called with the number of the step and the poses.

    Raises:
        FloatingPointError: the target is not finite; names the step.
    """
    count, samples = x.shape[:2]
    for step, h in enumerate(levels):
        moved = []
        for part in poses.split(chunk or len(poses)):
            y = transform(x, part)
            goal = target(y.flatten(1, 2), h).reshape(-1, count, samples, 3)
            if not torch.isfinite(goal).all():
                raise FloatingPointError(f"The target of step {step} (h = {h:.4g}) is not finite. The last poses before it were.")
            rotation, translation, _ = kabsch(x.expand_as(goal), goal)
            moved.append(pose_matrix(rotation, translation))
        poses = torch.cat(moved)
        if push is not None:
            fading = 1.0 if push.legacy else min(1.0, 3 * (len(levels) - step) / len(levels))
            poses = _pushed(x, poses, push, fading)
        if on_step is not None:
            on_step(step, poses)
    return poses


def _pushed(x: Tensor, poses: Tensor, push: PushApartConfig, fading: float) -> Tensor:
    import dataclasses

    config = dataclasses.replace(push, rate=push.rate * fading, rounds=push.rounds if push.legacy else 1)
    poses = poses.clone()
    for k, y in enumerate(transform(x, poses)):
        apart, _ = push_apart(y, config)
        poses[k, :, :3, 3] += apart[:, 0] - y[:, 0]
    return poses


def shared_scale(area: float, template_area: float) -> float:
    """The scale that makes parts of a whole area as large as a template: c = sqrt(template area / parts' area)."""
    return math.sqrt(template_area / area)
