"""Refinement of poses: denoise the assembly, fit each part rigidly to its denoised points, at falling noise levels.

    repeat for h in a falling schedule:   D = target(Y(g), h),   g_i = argmin sum_n |g_i x_in - D_in|^2       (Kabsch)

Each fit starts from the part in its own frame, never from where it was, so errors do not add up. What the target is (a template by
transport, a diffusion model, a scan) decides how good it is: see `genkit.assembly.couplings`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from scipy.spatial import KDTree
from torch import Tensor

from genkit.assembly.couplings import Target
from genkit.assembly.distances import nearest
from genkit.assembly.push import PushApartConfig, push_apart
from genkit.assembly.rigid import kabsch, pose_matrix, transform

ICP_STEPS, ICP_TOLERANCE = 100, 1e-6  # of the published rule


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
    fit: Literal["kabsch", "icp"] = "kabsch",
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
        fit: `kabsch` takes each point to its own target; `icp`, the published rule, takes it to the nearest target of its part,
            again and again, which ends near the same place and costs hundreds of times as much.
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
            if fit == "icp":
                moved.append(_by_icp(x, part, goal))
            else:
                moved.append(pose_matrix(*kabsch(x.expand_as(goal), goal)[:2]))
        poses = torch.cat(moved)
        if push is not None:
            fading = 1.0 if push.legacy else min(1.0, 3 * (len(levels) - step) / len(levels))
            poses = _pushed(x, poses, push, fading)
        if on_step is not None:
            on_step(step, poses)
    return poses


def _by_icp(x: Tensor, poses: Tensor, goal: Tensor) -> Tensor:
    """Poses (H, P, 4, 4) after ICP of each part, from where it is, to its own target (H, P, N, 3)."""
    poses = poses.clone()
    for h, p in itertools.product(range(len(poses)), range(len(x))):
        tree, error = KDTree(goal[h, p].numpy()), float("inf")
        for _ in range(ICP_STEPS):
            distance, index = nearest(transform(x[p], poses[h, p]), goal[h, p], tree)
            rotation, translation, _ = kabsch(x[p], goal[h, p, index])
            poses[h, p] = pose_matrix(rotation, translation)
            now = float(distance.square().mean().sqrt())
            if error - now <= ICP_TOLERANCE * now:
                break
            error = now
    return poses


def _pushed(x: Tensor, poses: Tensor, push: PushApartConfig, fading: float) -> Tensor:
    config = dataclasses.replace(push, rate=push.rate * fading, rounds=push.rounds if push.legacy else 1)
    poses = poses.clone()
    for k, y in enumerate(transform(x, poses)):
        apart, _ = push_apart(y, config)
        poses[k, :, :3, 3] += apart[:, 0] - y[:, 0]
    return poses
