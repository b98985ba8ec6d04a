"""Which pairs (noise level, noise) a diffusion classifier scores, in which order, and what each counts.

A class c is scored by the mean over pairs i of  w_i ||eps_i - eps_c(alpha_i x0 + sigma_i eps_i)||^2 / d,  d values in a sample. All
classes and images see the same pairs, so what is compared are paired differences (Li et al. 2023, arXiv 2303.16203).

Levels come in a low-discrepancy order: every prefix of the plan is spread over the whole time, so one can stop anywhere, and
whatever was scored is part of any longer run. Weights:

    uniform    w = 1, as all published classifiers have it: a surrogate of the likelihood
    elbo       w = d / 2 |d lambda / d u|, lambda = ln(alpha^2 / sigma^2): the score is -log p(x0 | c) in nats, up to a constant
               that all classes share (for u from 0 to 1, see `genkit.levels.training_level`)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from genkit import noise
from genkit.errors import unknown
from genkit.levels import Level, training_level

Weighting = str | Callable[[Tensor], Tensor]
ORDERS = ("golden", "vdc", "grid", "random")
WEIGHTINGS = ("uniform", "elbo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairPlan:
    """What to score.

    Args:
        count: pairs at most.
        order: of the levels. "golden": u = frac(1/2 + i / golden ratio), every prefix is spread evenly; "vdc": van der Corput's
            sequence, prefixes of 2^k are evenly spaced; "grid": from low to high noise; "random": independent.
        trials: noises for each level.
        antithetic: every noise is followed by its negative. It helps where classes are equal isotropic Gaussians and hurts
            elsewhere, so it is off.
        weighting: "uniform", "elbo", or a function of lambda = ln(alpha^2 / sigma^2) (n,) that returns weights (n,).
        seed: of the noise bank.
        span: the part (low, high) of the training time that is scored.
        timesteps: the levels themselves as training timesteps, in this order, instead of `order` and `count`.

    Raises:
        ValueError: a count that is not positive, an unknown order or weighting, a span outside 0 to 1.

    Example:
        >>> pairs = PairPlan(count=64, weighting="elbo").pairs(pipe.scheduler, (4, 64, 64))
        >>> x = pairs.level[:8].diffuse(x0, pairs.noise(range(8)))
    """

    count: int = 64
    order: str = "golden"
    trials: int = 1
    antithetic: bool = False
    weighting: Weighting = "uniform"
    seed: int = 42
    span: tuple[float, float] = (0.0, 1.0)
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.trials < 1:
            raise ValueError(f"A plan has at least one pair and one trial, got count={self.count} and trials={self.trials}.")
        if self.order not in ORDERS:
            raise unknown("order of pairs", self.order, ORDERS)
        if isinstance(self.weighting, str) and self.weighting not in WEIGHTINGS:
            raise unknown("weighting", self.weighting, WEIGHTINGS)
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span={self.span} is not a part of the time: give (low, high) with 0 <= low < high <= 1.")
        if self.timesteps is not None and len(self.timesteps) * self._repeats != self.count:
            raise ValueError(f"There are {len(self.timesteps)} timesteps with {self._repeats} noises each, but count={self.count}.")

    @classmethod
    def reference(cls, name: str, count: int | None = None, *, num_train_timesteps: int = 1000, **settings: Any) -> PairPlan:
        """The grid of the published code.

        Args:
            name: "text" (text-to-image, with rounds: `FixedRounds(..., nested=False)`) or "dit" (class-conditional).
            count: timesteps; 500 and 250 by default.
            settings: other arguments of the plan.

        "text" has t = range((T // n) // 2, T, T // n)[:n], which stops short of T where n does not divide it (n = 300: 898);
        "dit" has t = 2, 6, ..., 998.
        """
        if name not in ("text", "dit"):
            raise unknown("reference plan", name, ("text", "dit"))
        n = count or {"text": 500, "dit": 250}[name]
        if not 1 <= n <= num_train_timesteps:
            raise ValueError(f"{n} timesteps do not fit into {num_train_timesteps}. Give 1 to {num_train_timesteps}.")
        step = num_train_timesteps // n
        grid = tuple(range(step // 2, num_train_timesteps, step))[:n]
        trials = settings.get("trials", 1) * (2 if settings.get("antithetic") else 1)
        return cls(count=len(grid) * trials, order="grid", timesteps=grid, **settings)

    @property
    def _repeats(self) -> int:
        return self.trials * (2 if self.antithetic else 1)

    def times(self, num_train_timesteps: int) -> np.ndarray:
        """The fraction u (count,) of training time of each pair."""
        levels = -(-self.count // self._repeats)
        if self.timesteps is not None:
            u = (np.asarray(self.timesteps) + 0.5) / num_train_timesteps
        else:
            u = self.span[0] + (self.span[1] - self.span[0]) * _unit(self.order, levels, self.seed)
        return np.repeat(u, self._repeats)[: self.count]

    def pairs(self, scheduler: Any, shape: Sequence[int]) -> Pairs:
        """The pairs for samples of `shape` under a scheduler's noise schedule."""
        u = self.times(int(scheduler.config.num_train_timesteps))
        level = training_level(scheduler, torch.from_numpy(u))
        return Pairs(self, u, level, self._weights(scheduler, u, level, math.prod(shape)), tuple(shape))

    def _weights(self, scheduler: Any, u: np.ndarray, level: Level, size: int) -> Tensor:
        if self.weighting == "uniform":
            return torch.ones(len(u), dtype=torch.float64)
        if self.weighting == "elbo":
            # Of the span alone, since the pairs are spread over it.
            return size / 2 * (self.span[1] - self.span[0]) * _log_snr_slope(scheduler, u)
        assert callable(self.weighting)
        weight = torch.as_tensor(self.weighting(torch.as_tensor(level.log_snr)), dtype=torch.float64)
        if weight.shape != (len(u),) or not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise ValueError(
                f"The weighting returned {weight.flatten()[:3].tolist()}... Return {len(u)} finite weights, not negative."
            )
        return weight


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a plan for samples of one shape: `u`, `level` and `weight` have n entries, `noise` makes those that are asked
    for.

    Example:
        >>> len(pairs), pairs.level.sigma, pairs.noise([3, 4]).shape       # 64, (64,), (2, 4, 64, 64)
    """

    plan: PairPlan
    u: np.ndarray
    level: Level
    weight: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.u)

    def noise(self, indices: Sequence[int]) -> Tensor:
        """Standard normal noise (n, *shape) of some pairs, float32 on the CPU; a function of (seed, index) alone."""
        fold = 2 if self.plan.antithetic else 1
        # The seed goes to the high half of a 64-bit counter: banks of different seeds never meet.
        eps = noise.normal([(self.plan.seed << 32) + int(i) // fold for i in indices], self.shape, noise.SCORING)
        signs = torch.tensor([-1.0 if int(i) % fold else 1.0 for i in indices])
        return eps * signs.reshape(-1, *[1] * len(self.shape))


def _unit(order: str, count: int, seed: int) -> np.ndarray:
    """`count` points of [0, 1)."""
    if order == "grid":
        return (np.arange(count) + 0.5) / count
    if order == "random":
        return np.random.default_rng(seed).random(count)
    if order == "vdc":
        # In the middle of the cells of the finest grid that the points fill.
        return qmc.Halton(1, scramble=False).random(count)[:, 0] + 0.5 / 2 ** math.ceil(math.log2(count))
    return (0.5 + np.arange(count) * (math.sqrt(5) - 1) / 2) % 1.0


def _log_snr_slope(scheduler: Any, u: np.ndarray) -> Tensor:
    """|d lambda / du| (n,) by central differences; on a table of T timesteps between neighbours."""
    h = 0.5 / scheduler.config.num_train_timesteps
    low, high = (torch.from_numpy(np.clip(u + step, 0, 1 - 1e-12)) for step in (-2 * h, 2 * h))
    # Zero terminal SNR has lambda = -inf at the end: such a table ends one entry earlier.
    levels = [training_level(scheduler, v) for v in (low, high)]
    slope = (torch.as_tensor(levels[0].log_snr) - torch.as_tensor(levels[1].log_snr)) / (high - low)
    return torch.where(torch.isfinite(slope), slope.abs(), torch.zeros_like(slope))
