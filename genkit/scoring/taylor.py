"""Taylor shortlist: one forward and one backward pass rank all classes.

The loss at the mean condition c = sum_k w_k c_k, w_k = 1 / K, has the derivative dL / dw_k = g . c_k, so to first order

    L(c_k) = L(c) + dL / dw_k - mean_j dL / dw_j

for every class at once, however many there are. The best few go on to an exact policy.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.scoring.policy import Board, Narrowing, Policy, SlopeRequest
from genkit.scoring.race import Race


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taylor(Policy):
    """Rank all arms by the derivative of the loss at their mean, keep the first, decide between them exactly.

    Args:
        pairs: pairs whose derivatives are averaged; each costs a forward and a backward pass, counted as two evaluations.
        shortlist: arms that are kept.
        inner: how those are compared. The error bound is its; it says nothing about the arms that were not kept.

    Raises:
        ValueError: no pairs, or a shortlist below 2.
    """

    pairs: int = 16
    shortlist: int = 10
    inner: Policy = dataclasses.field(default_factory=Race)

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.shortlist < 2:
            raise ValueError(f"Taylor needs pairs >= 1 and shortlist >= 2, got {self.pairs} and {self.shortlist}.")

    def check(self, arms: int, pairs: int) -> None:
        if self.pairs > pairs:
            raise ValueError(f"Taylor wants {self.pairs} pairs, but the plan has {pairs}. Give PairPlan a larger count.")
        self.inner.check(arms, pairs)

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        if len(arms) > max(self.shortlist, keep):
            slopes = yield SlopeRequest(np.array(arms), np.arange(self.pairs))
            board.evaluations += 2 * self.pairs
            order = np.argsort(slopes + board.offsets[arms], kind="stable")
            arms = [arms[i] for i in order[: max(self.shortlist, keep)]]
        return (yield from self.inner.narrow(board, arms, keep))
