"""Schedules: how strongly a guidance acts at each evaluation, and on which samples.

A schedule is a function of the state that returns a number, or one for each sample (B,); `guidance.scheduled(schedule)` multiplies
the guidance by it, so schedules compose by repetition. 0 switches off. With p the fraction of the run that is done and sigma/alpha
the noise-to-signal ratio:

    between   1 while start <= p <= stop               FreeDoM's stages, Yu et al. 2023 (arXiv 2303.09833)
    within    1 while low <= sigma/alpha <= high       guidance in a limited interval, Kynkaanniemi et al. 2024 (arXiv 2404.07724)
    linear    first + (last - first) p
    cosine    last + (first - last) (1 + cos(pi p)) / 2
    sine      1 + gamma sin(pi p)                      EluCD, Ma et al. 2024 (arXiv 2310.11311), section 4.4
    below     1 while a sample's log-potential is below a threshold
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genkit.levels import Level, broadcast

if TYPE_CHECKING:
    from genkit.guidance.state import State

Weight = float | Tensor
Schedule = Callable[["State"], Weight]


def between(start: float, stop: float) -> Schedule:
    """On while `start <= progress <= stop`, fractions of the run.

    Raises:
        ValueError: not 0 <= start <= stop <= 1.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"between({start}, {stop}) is no interval in 0 to 1.")
    return lambda state: float(start <= state.progress <= stop)


def within(low: float, high: float) -> Schedule:
    """On while the noise-to-signal ratio sigma/alpha of a sample is from `low` to `high` (`math.inf` for no limit).

    The ratio means the same with every scheduler: it is the sigma of EDM and of Euler, sigma / (1 - sigma) of flow matching.

    Raises:
        ValueError: not 0 <= low <= high.
    """
    if not 0 <= low <= high:
        raise ValueError(f"within({low}, {high}) is no interval of noise levels. Give 0 <= low <= high.")

    def schedule(state: State) -> Weight:
        ratio = noise_to_signal(state.level)
        return ((ratio >= low) & (ratio <= high)).float() if isinstance(ratio, Tensor) else float(low <= ratio <= high)

    return schedule


def linear(first: float, last: float) -> Schedule:
    """From `first` at the start of the run straight to `last` at its end."""
    return lambda state: first + (last - first) * state.progress


def cosine(first: float, last: float) -> Schedule:
    """From `first` to `last` along half a cosine: flat at both ends."""
    return lambda state: last + (first - last) * (1 + math.cos(math.pi * state.progress)) / 2


def sine(gamma: float) -> Schedule:
    """1 at both ends of the run and 1 + gamma in its middle."""
    return lambda state: 1 + gamma * math.sin(math.pi * state.progress)


def below(threshold: float, name: str = "energy") -> Schedule:
    """On for each sample until its log-potential reaches `threshold`; then off for the rest of the run.

    Args:
        name: the guidance whose log-potential counts, `guidance.name` as a rule.
    """

    def schedule(state: State) -> Weight:
        value = state.energy.get(name)
        # NaN, a sample without a value so far, counts as below.
        return 1.0 if value is None else (~(value >= threshold)).float()

    return schedule


def noise_to_signal(level: Level) -> float | Tensor:
    """sigma/alpha of a level, (B,) for one level per sample; infinite where there is no signal."""
    if isinstance(level.alpha, Tensor) or isinstance(level.sigma, Tensor):
        return torch.as_tensor(level.sigma) / torch.as_tensor(level.alpha)
    return level.sigma / level.alpha if level.alpha else math.inf


def checked(weight: object, count: int, name: str) -> Weight:
    """What a schedule returned, as a float or a detached tensor (B,).

    Raises:
        ValueError: it is not finite, or neither a number nor one for each of `count` samples.
    """
    if isinstance(weight, Tensor) and weight.numel() == 1 and weight.shape != (count,):
        weight = weight.item()
    if isinstance(weight, (int, float)) and math.isfinite(weight):
        return float(weight)
    if isinstance(weight, Tensor) and weight.shape == (count,) and torch.isfinite(weight).all():
        return weight.detach()
    got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) and weight.shape != (count,) else f"{weight!r:.80}"
    raise ValueError(
        f"The schedule of guidance {name!r} must return a finite number, or one for each sample (shape ({count},)); got {got}."
    )


def is_off(weight: Weight) -> bool:
    """Whether a weight is 0 for all samples."""
    return not weight.any() if isinstance(weight, Tensor) else weight == 0


def multiply(a: Weight, b: Weight) -> Weight:
    """The product of two weights, on the device of the first tensor."""
    return a * b.to(a.device) if isinstance(a, Tensor) and isinstance(b, Tensor) else a * b


def weighted(weight: Weight, c: Tensor) -> Tensor:
    """weight * c for c of shape (B, ...), and zeros where the weight is 0, whatever c is there."""
    if not isinstance(weight, Tensor):
        return weight * c
    w = torch.as_tensor(broadcast(weight, c))
    return torch.where(w == 0, torch.zeros_like(c), w * c)
