"""DIVE: a gradient proposes classes, and another policy decides between those (IEEE TMM 2025, arXiv 2504.17253).

The proposals are those of a search of `genkit.inversion` with one slot, whose vocabulary are the embeddings of the classes. Losses
and gradients are functions of class and pair, and asked for once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from genkit.inversion.descent import Descent
from genkit.inversion.leaps import Leaps
from genkit.inversion.projectors import Gumbel, Softmax
from genkit.inversion.query import Answer, Query, Search, spread
from genkit.scoring.policy import Board, EmbeddingRequest, Exhaustive, GradientRequest, Narrowing, Policy
from genkit.scoring.race import Race


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dive(Policy):
    """Search with gradients, decide exactly.

    Args:
        proposer: what proposes them: `Leaps`, or `Descent` as published.
        shortlist: with no more classes than that there is no search: all are compared.
        inner: how proposals are compared. The error bound is its; it says nothing about the classes that were not proposed.
        seed: of what is random in the search.

    A gradient costs a forward and a backward pass, counted as two evaluations.

    Raises:
        ValueError: a shortlist below 2, or a descent through mixtures of classes, which are none.

    Example:
        >>> pipe(images, labels=names, policy="dive")
        >>> pipe(images, labels=range(1000), policy=Dive.published(), plan=PairPlan.reference("dit"))
    """

    proposer: Search = dataclasses.field(default_factory=lambda: Leaps(patience=16, finalists=20))
    shortlist: int = 10
    inner: Policy = dataclasses.field(default_factory=Race)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shortlist < 2:
            raise ValueError(f"shortlist={self.shortlist} must be at least 2.")
        projector = self.proposer.projector if isinstance(self.proposer, Descent) else None
        if isinstance(projector, Softmax) and not isinstance(projector, Gumbel):
            raise ValueError("A mixture of classes is no class. Use Nearest() or Gumbel().")

    @classmethod
    def published(cls) -> Dive:
        """The published schedule, for `PairPlan.reference("dit")`.

        20 loops of 10 steps over 250 pairs; each class that is nearest at the end of a loop is scored on all pairs, and the lowest
        mean wins. Of its 15,000 evaluations only those are made that have not been made before.
        """
        return cls(proposer=Descent.published(), shortlist=2, inner=Exhaustive())

    def check(self, arms: int, pairs: int) -> None:
        if arms > self.shortlist:
            self.proposer.check(pairs)
        self.inner.check(arms, pairs)

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        if len(arms) > max(self.shortlist, keep):
            arms = yield from self._proposed(board, arms)
        return (yield from self.inner.narrow(board, arms, keep))

    def _proposed(self, board: Board, arms: list[int]) -> Narrowing:
        """The arms that may be the answer, in the order in which the search says so."""
        vocabulary = yield EmbeddingRequest(np.array(arms))
        queries = self.proposer.begin(vocabulary, spread(board.u), torch.Generator().manual_seed(self.seed))
        proposed: dict[int, None] = {}
        query: Query | None = next(queries)
        while query is not None:
            points = [arms[k] for k in query.rows[:, 0].tolist()]
            if query.final:
                proposed |= dict.fromkeys(points)
            answer = None if query.final else (yield from _answer(board, points, query))
            try:
                query = queries.send(answer)
            except StopIteration:
                query = None
        return list(proposed)


def _answer(board: Board, arms: list[int], query: Query) -> Generator[Any, Any, Answer]:
    """Losses and gradients of arms, or of a point that is none."""
    if query.offset is not None:
        grid = np.repeat(arms, len(query.pairs)), np.tile(query.pairs, len(arms))
        offset = query.offset[:, 0].repeat_interleave(len(query.pairs), 0).cpu().numpy()
        given = yield GradientRequest(*grid, offset)
        board.evaluations += 2 * int(board.costs[grid[0]].sum())
        given = given.reshape(len(arms), len(query.pairs), -1)
        return Answer(given[:, :, 0], torch.from_numpy(given[:, :, 1:].mean(1))[:, None])
    if query.gradient:
        gradient = yield from board.differentiate(arms, query.pairs)
        return Answer(board.losses[arms][:, query.pairs], torch.from_numpy(gradient)[:, None])
    yield from board.score(arms, query.pairs)
    return Answer(board.losses[arms][:, query.pairs])
