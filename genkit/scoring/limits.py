"""A budget: no image costs more network evaluations than that, whatever the policy asks for.

A request that goes beyond the budget is cut to the pairs that fit, every arm on each of them, and the best mean wins. What the
search has missed shows in the error bound. Gradients that go beyond it are not taken: the best arm so far wins.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.scoring.dive import Dive
from genkit.scoring.policy import Board, EmbeddingRequest, GradientRequest, Narrowing, Policy, Request, SlopeRequest, Wanted
from genkit.scoring.taylor import Taylor
from genkit.scoring.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within(Policy):
    """Another policy, ended when its evaluations are used up.

    Args:
        inner: the policy.
        budget: evaluations of one comparison, at most. `within` divides the budget of an image among its comparisons.
        least: evaluations without which there is no answer; by default one pair of each arm.

    Raises:
        ValueError: a comparison of more arms than evaluations (when it comes up).
    """

    inner: Policy
    budget: int
    least: int | None = None

    def check(self, arms: int, pairs: int) -> None:
        self.inner.check(arms, pairs)

    def entrants(self, arms: int) -> list[int]:
        return self.inner.entrants(arms)

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        if self.least is None and board.costs[arms].sum() > self.budget:
            raise ValueError(f"A budget of {self.budget} evaluations is below one pair for each of {len(arms)} classes. Raise it.")
        end = board.evaluations + self.budget
        search = self.inner.narrow(board, arms, keep)
        try:
            request = next(search)
            while board.evaluations + _cost(board, request) <= end:
                answer = yield request
                request = search.send(answer)
        except StopIteration as stop:
            return stop.value
        search.close()
        if isinstance(request, Request):
            arms = list(dict.fromkeys(request.arms.tolist()))
            pairs = np.array(list(dict.fromkeys(request.pairs.tolist())))
            cost = np.cumsum(board.costs[arms] @ np.isnan(board.losses[arms][:, pairs]))
            yield from board.score(arms, pairs[cost <= end - board.evaluations])
        else:
            arms = np.flatnonzero(~np.isnan(board.losses).all(1)).tolist()
        if not np.isfinite(board.means(arms)).all():
            # Nothing compares them. A descent dwells on the best.
            arms = [int((~np.isnan(board.losses)).sum(1).argmax())]
        board.note(arms)
        return board.best(arms, keep)


def _cost(board: Board, request: Wanted) -> int:
    """Evaluations of a request."""
    if isinstance(request, EmbeddingRequest):
        return 0
    if isinstance(request, SlopeRequest):
        return 2 * len(request.pairs)
    return int(board.costs[request.arms].sum()) * (2 if isinstance(request, GradientRequest) else 1)


def within(policy: Policy, budget: int, arms: int, cost: int) -> Policy:
    """The policy, at no more than `budget` evaluations an image of `arms` arms.

    Args:
        cost: evaluations that one pair of every arm takes.

    Raises:
        ValueError: a budget that is used up before a single pair of each class was scored.
    """
    if isinstance(policy, Dive) and arms > policy.shortlist:
        least = policy.proposer.opening * -(-cost // arms)
        if budget < least:
            raise ValueError(
                f"A budget of {budget} evaluations is used up before the search has scored a class. Give {least} or more."
            )
        return Within(inner=policy, budget=budget, least=least)
    if isinstance(policy, Tree):
        return dataclasses.replace(policy, inner=Within(inner=policy.inner, budget=budget // policy.levels))
    slopes, contestants = 0, arms
    if isinstance(policy, Taylor) and arms > policy.shortlist:
        slopes, contestants = 2 * policy.pairs, policy.shortlist
    if budget - slopes < cost * contestants / arms:
        ranking = f" after the {slopes} evaluations of the ranking" if slopes else ""
        raise ValueError(
            f"A budget of {budget} evaluations is below one pair for each of {contestants} classes{ranking}. Raise it."
        )
    if isinstance(policy, Taylor):
        return dataclasses.replace(policy, inner=Within(inner=policy.inner, budget=budget - slopes))
    return Within(inner=policy, budget=budget)
