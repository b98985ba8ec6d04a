"""A budget: no image costs more network evaluations than that, whatever the policy asks for.

A request that goes beyond the budget is cut to the pairs that fit, every arm on each of them, and the best mean wins. What the
search has missed shows in the error bound.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from genkit.scoring.policy import Board, Narrowing, Policy, Request
from genkit.scoring.taylor import Taylor
from genkit.scoring.tree import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within(Policy):
    """Another policy, ended when its evaluations are used up.

    Args:
        inner: the policy.
        budget: evaluations of one comparison, at most. `within` divides the budget of an image among its comparisons.

    Raises:
        ValueError: a comparison of more arms than evaluations (when it comes up).
    """

    inner: Policy
    budget: int

    def check(self, arms: int, pairs: int) -> None:
        self.inner.check(arms, pairs)

    def entrants(self, arms: int) -> list[int]:
        return self.inner.entrants(arms)

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        if board.costs[arms].sum() > self.budget:
            raise ValueError(f"A budget of {self.budget} evaluations is below one pair for each of {len(arms)} classes. Raise it.")
        end = board.evaluations + self.budget
        search = self.inner.narrow(board, arms, keep)
        try:
            request = next(search)
            while isinstance(request, Request) and board.evaluations + board.costs[request.arms].sum() <= end:
                answer = yield request
                request = search.send(answer)
        except StopIteration as stop:
            return stop.value
        search.close()
        arms = list(dict.fromkeys(request.arms.tolist()))
        pairs = np.array(list(dict.fromkeys(request.pairs.tolist())))
        cost = np.cumsum(board.costs[arms] @ np.isnan(board.losses[arms][:, pairs]))
        yield from board.score(arms, pairs[cost <= end - board.evaluations])
        board.note(arms)
        return board.best(arms, keep)


def within(policy: Policy, budget: int, arms: int, cost: int) -> Policy:
    """The policy, at no more than `budget` evaluations an image of `arms` arms.

    Args:
        cost: evaluations that one pair of every arm takes.

    Raises:
        ValueError: a budget that is used up before a single pair of each class was scored.
    """
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
