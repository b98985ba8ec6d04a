"""Scores against the null condition, which make different images comparable: pointwise mutual information,

    score_c - score_null  =  -log p(x0 | c) / p(x0)  =  -PMI(x0, c)          (in nats with `elbo` weights)

It costs one more evaluation for each pair of the winner, and never changes the order of the classes of an image.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.scoring.policy import Board, Narrowing, Policy, Search


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgainstNull(Policy):
    """Another policy over all arms but the last, which is the null condition and is scored on the winner's pairs.

    Args:
        inner: the policy.

    The verdict's last score is that of the null condition. The others are not shifted: subtract it.
    """

    inner: Policy

    def check(self, arms: int, pairs: int) -> None:
        self.inner.check(arms - 1, pairs)

    def entrants(self, arms: int) -> list[int]:
        return self.inner.entrants(arms - 1)

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        return (yield from self.inner.narrow(board, arms, keep))

    def conclude(self, board: Board, arm: int) -> Search:
        verdict = board.verdict(arm)  # before the null condition is on the board, so that the error bound leaves it out
        null, seen = len(board.losses) - 1, np.flatnonzero(~np.isnan(board.losses[arm]))
        yield from board.score([null], seen)
        scores, counts = verdict.scores.copy(), verdict.counts.copy()
        scores[-1], counts[-1] = board.losses[null, seen].mean(), len(seen)
        return dataclasses.replace(verdict, scores=scores, counts=counts, evaluations=board.evaluations)
