"""Descent: v is moved by the gradient at the row that it is projected to (DIVE, arXiv 2504.17253).

    repeat for `loops` loops over the N pairs, m at a time:
        y = P(v)                        a genuine row E_k, by a straight-through projection
        v <- v - AdamW(mean over m pairs of d loss_i(y) / d y)
    after each loop: all N pairs at the nearest row, without a gradient; the best row is the answer

Since y is a row and pairs are fixed, loss and gradient are functions of (row, pair) alone: whoever answers the queries may remember
them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.errors import unknown
from genkit.inversion.projectors import Nearest, Projector
from genkit.inversion.query import Answer, Queries, Query, Search
from genkit.inversion.slots import Vocabulary

STARTS = ("mean", "scatter", "published")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW on v.

    Args:
        lr: in units of the vocabulary's spread (root mean square over its coordinates), if `relative`. With 0 the slots stay as an
            earlier search has left them, and free numbers alone are refined.
        free_lr: of free numbers, in units of their range, if `relative`; `lr` by default.
        relative: False takes both as they are.
        betas, weight_decay: of AdamW. Decay draws v to zero; free numbers have none.
        start: where v begins: "mean" (of the rows that a slot may hold; restarts after the first are scattered), "scatter" (normal
            with the mean and the standard deviation of each coordinate over these rows), or "published" (normal with the mean and
            the standard deviation of all numbers of the table).

    Raises:
        ValueError: numbers out of range, an unknown start.
    """

    lr: float = 0.1
    free_lr: float | None = None
    relative: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    start: str = "scatter"

    def __post_init__(self) -> None:
        for name in ("lr", "free_lr", "weight_decay"):
            if not 0 <= (getattr(self, name) or 0) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative.")
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)

    @classmethod
    def published(cls) -> Optimiser:
        """AdamW with lr 1e-2 and decay 0.01 from a random start, as the published code has it."""
        return cls(lr=1e-2, relative=False, weight_decay=0.01, start="published")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """When a descent ends.

    Args:
        loops: over the pairs, at most.
        patience: loops in a row after which the nearest rows were the same as before; None goes on to the end, as the published
            code does.

    Raises:
        ValueError: numbers below 1.
    """

    loops: int = 20
    patience: int | None = 2

    def __post_init__(self) -> None:
        if self.loops < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"loops={self.loops} and patience={self.patience} must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descent(Search):
    """The descent of several walkers at once.

    Args:
        projector: from v to the vocabulary.
        optimiser: of v.
        batch: pairs of a step.
        shuffle: draw the pairs of a step anew in each loop, as published; else steps take the same pairs in each loop, spread over
            all levels.
        restarts: walkers.
        stop: when each of them ends.

    Raises:
        ValueError: numbers below 1.
    """

    projector: Projector = dataclasses.field(default_factory=Nearest)
    optimiser: Optimiser = dataclasses.field(default_factory=Optimiser)
    batch: int = 8
    shuffle: bool = False
    restarts: int = 1
    stop: Stop = dataclasses.field(default_factory=Stop)

    def __post_init__(self) -> None:
        for name in ("batch", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @classmethod
    def published(cls) -> Descent:
        """What the published code does: 20 loops of steps of 25 pairs, drawn anew in each loop, to the end."""
        return cls(optimiser=Optimiser.published(), batch=25, shuffle=True, stop=Stop(loops=20, patience=None))

    @property
    def opening(self) -> int:
        return 2 * self.batch * self.restarts

    def check(self, pairs: int) -> None:
        if self.batch > pairs:
            raise ValueError(f"A step wants {self.batch} pairs, but the plan has {pairs}. Give PairPlan a larger count.")

    def begin(self, slots: Vocabulary, pairs: np.ndarray, generator: torch.Generator, start: Query | None = None) -> Queries:
        walk = Walk(slots, self, generator, start)
        walkers, order = np.arange(self.restarts), pairs
        last = torch.full((self.restarts, len(slots)), -1)
        unchanged = np.zeros(self.restarts, dtype=int)
        for _ in range(self.stop.loops):
            if self.shuffle:
                order = pairs[torch.randperm(len(pairs), generator=generator).numpy()]
            for begin in range(0, len(pairs), self.batch):
                answer = yield walk.query(walkers, order[begin : begin + self.batch])
                assert answer is not None
                walk.step(walkers, answer)
            end = walk.nearest(walkers, pairs)
            yield end
            rows = end.rows.cpu()
            same = (rows == last[walkers]).all(1).numpy()
            unchanged[walkers] = np.where(same, unchanged[walkers] + 1, 0)
            last[walkers] = rows
            if self.stop.patience is not None:
                walkers = walkers[unchanged[walkers] < self.stop.patience]
            if not len(walkers):
                return


class Walk:
    """The state of R walkers: `v` (R, S, D) and the free numbers (R, ...)."""

    def __init__(self, slots: Vocabulary, settings: Descent, generator: torch.Generator, start: Query | None) -> None:
        self.slots, self.projector, self.generator = slots, settings.projector, generator
        table, optimiser = slots.table.float(), settings.optimiser
        v = _start(slots, table, optimiser, settings.restarts, generator)
        if start is not None:
            v[0] = table[start.rows[0]]
        self.v = v.requires_grad_(True)
        spread = float(table.var(0, correction=0).mean().sqrt()) if optimiser.relative else 1.0
        groups: list[dict[str, Any]] = [{"params": [self.v], "lr": optimiser.lr * spread}]
        self.free: Tensor | None = None
        if slots.free is not None:
            free = slots.scattered(settings.restarts, generator)
            assert free is not None
            if start is not None and start.free is not None:
                free[0] = start.free[0]
            self.free = free.to(table).requires_grad_(True)
            lr = optimiser.lr if optimiser.free_lr is None else optimiser.free_lr
            width = slots.free.high - slots.free.low if optimiser.relative else 1.0
            groups.append({"params": [self.free], "lr": lr * width, "weight_decay": 0.0})
        self.optimiser = torch.optim.AdamW(groups, betas=optimiser.betas, weight_decay=optimiser.weight_decay)

    def query(self, walkers: np.ndarray, pairs: np.ndarray) -> Query:
        """Project all walkers; what is asked is of some."""
        with torch.enable_grad():
            projection = self.projector(self.v, self.slots, self.generator)
        self._values, rows = projection.values, projection.rows[walkers]
        values = projection.values.detach()[walkers]
        offset = None if projection.exact else values - self.slots.table[rows].to(values)
        return Query(rows, pairs, True, offset=offset, free=self._free(walkers), walkers=walkers)

    def nearest(self, walkers: np.ndarray, pairs: np.ndarray) -> Query:
        """The nearest rows of some walkers, which may be the answer."""
        rows = self.projector.nearest(self.v[walkers], self.slots)
        return Query(rows, pairs, final=True, free=self._free(walkers), walkers=walkers)

    def step(self, walkers: np.ndarray, answer: Answer) -> None:
        """Move by the gradients of some walkers; the others have ended."""
        self.optimiser.zero_grad()
        assert answer.gradient is not None
        whole = torch.zeros_like(self.v)
        whole[walkers] = answer.gradient.to(whole)
        self._values.backward(whole)
        if self.free is not None and answer.free is not None:
            self.free.grad = torch.zeros_like(self.free)
            self.free.grad[walkers] = answer.free.to(self.free)
        self.optimiser.step()
        if self.free is not None and self.slots.free is not None:
            self.free.data.clamp_(self.slots.free.low, self.slots.free.high)

    def _free(self, walkers: np.ndarray) -> Tensor | None:
        return None if self.free is None else self.free.detach()[walkers].clone()


def _start(slots: Vocabulary, table: Tensor, optimiser: Optimiser, restarts: int, generator: torch.Generator) -> Tensor:
    """v (R, S, D) at the beginning."""
    noise = torch.randn(restarts, len(slots), table.shape[1], generator=generator).to(table)
    if optimiser.start == "published":
        return slots.mean + slots.std * noise
    if optimiser.start == "mean":
        noise[0] = 0
    share = slots.share
    mean = share @ table
    return mean + (share @ table.square() - mean.square()).clamp(min=0).sqrt() * noise
