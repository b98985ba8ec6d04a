"""Leaps: from the best rows so far along the gradient to the nearest ones that were not met, and on from there if they are better.

At the best point E_k with gradient g the loss of another row in a slot is, to first order and with a penalty for its distance,

    L(E_j) ~ L(E_k) + g . (E_j - E_k) + |g| / (2 s) |E_j - E_k|^2,

whose order in j is that of the distances of E_j to the point E_k - s g / |g|, a step of length s along the gradient. Rows are tried
in this order on a few pairs, without a gradient. A better one becomes the best point, and a gradient is taken there. The first
point is the best by the gradient at the mean of the vocabulary, where the network has never been told of a condition, but its
gradient is a good guide (`genkit.scoring.Taylor`).

This is DIVE's descent with a memory: a straight-through descent comes back to the same rows again and again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from genkit.inversion.query import Queries, Query, Search
from genkit.inversion.slots import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaps(Search):
    """Try rows in the order in which the gradient at the best ones foretells them.

    Args:
        pairs: of the plan, from its beginning, that a point is tried on.
        first: pairs of the gradient at the mean; 0 begins at the rows that are nearest to the mean.
        step: s, in units of the vocabulary's spread (root mean square distance of its rows to their mean).
        patience: points in a row that are not better before it ends.
        finalists: points, best first, that may be the answer.

    Of several slots one is changed at a time. Free numbers stay as they are.

    Raises:
        ValueError: numbers out of range.
    """

    pairs: int = 4
    first: int = 8
    step: float = 1.5
    patience: int = 8
    finalists: int = 4

    def __post_init__(self) -> None:
        if min(self.pairs, self.patience, self.finalists) < 1 or self.first < 0:
            raise ValueError(f"Leaps need pairs, patience and finalists of at least 1 and first >= 0, got {self}.")
        if not self.step > 0:
            raise ValueError(f"step={self.step} must be positive.")

    @property
    def opening(self) -> int:
        return 2 * self.first + self.pairs

    def check(self, pairs: int) -> None:
        if max(self.pairs, self.first) > pairs:
            raise ValueError(
                f"Leaps want {max(self.pairs, self.first)} pairs, but the plan has {pairs}. Give PairPlan a larger count."
            )

    def begin(self, slots: Vocabulary, pairs: np.ndarray, generator: torch.Generator, start: Query | None = None) -> Queries:
        few, free = pairs[: self.pairs], slots.scattered(1, generator) if start is None else start.free
        if start is not None:
            rows = start.rows
        elif self.first:
            query = dataclasses.replace(_at_mean(slots, pairs[: self.first]), free=free)
            answer = yield query
            assert answer is not None
            assert answer.gradient is not None
            foretold = answer.gradient[0].to(slots.table) @ slots.table.mT
            rows = foretold.masked_fill(~slots.allowed, torch.inf).argmin(-1)[None]
        else:
            rows = _at_mean(slots, few).rows
        met: dict[tuple[int, ...], float] = {}
        best, others, missed = rows, iter([rows]), 0
        while missed < self.patience:
            found = next((r for r in others if tuple(r[0].tolist()) not in met), None)
            if found is None:
                break
            rows = found
            answer = yield Query(rows, few, free=free)
            assert answer is not None
            loss, missed = float(answer.losses.mean()), missed + 1
            if loss < min(met.values(), default=np.inf):
                best, missed = rows, 0
                answer = yield Query(best, few, True, free=free)
                assert answer is not None
                assert answer.gradient is not None
                others = _foretold(slots, best, answer.gradient[0], self.step)
            met[tuple(rows[0].tolist())] = loss
        last = torch.tensor(sorted(met, key=met.__getitem__)[: self.finalists], device=best.device)
        yield Query(last, pairs, final=True, free=None if free is None else free.expand(len(last), *free.shape[1:]))


def _at_mean(slots: Vocabulary, pairs: np.ndarray) -> Query:
    """All slots at the mean of what they may hold."""
    table = slots.table.float()
    mean = slots.share @ table
    distances = torch.cdist(mean, table, compute_mode="donot_use_mm_for_euclid_dist")
    rows = distances.masked_fill(~slots.allowed, torch.inf).argmin(-1)
    return Query(rows[None], pairs, True, offset=(mean - table[rows])[None])


def _foretold(slots: Vocabulary, rows: Tensor, gradient: Tensor, step: float) -> Iterator[Tensor]:
    """Rows (1, S) with one slot changed, those with the lowest foretold loss first."""
    table = slots.table.float()
    length = step * float(table.var(0, correction=0).sum().sqrt())
    gradient = gradient.to(table)
    norm = float(gradient.square().sum(-1).mean().sqrt())
    here = table[rows[0]]
    squared = torch.cdist(here, table, compute_mode="donot_use_mm_for_euclid_dist").square()
    change = gradient @ table.mT - (gradient * here).sum(-1, keepdim=True) + norm / (2 * length) * squared
    change = change.masked_fill(~slots.allowed, torch.inf).scatter(1, rows[0][:, None], torch.inf)
    values, order = change.flatten().sort(stable=True)
    for index in order[torch.isfinite(values)].tolist():
        other = rows.clone()
        other[0, index // len(table)] = index % len(table)
        yield other
