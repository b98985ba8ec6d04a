"""Policies by name, with settings that fit the number of classes, the plan and the budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from genkit.errors import unknown
from genkit.inversion.leaps import Leaps
from genkit.scoring.dive import Dive
from genkit.scoring.limits import within
from genkit.scoring.plan import PairPlan
from genkit.scoring.policy import Exhaustive, FixedRounds, Policy
from genkit.scoring.race import Race
from genkit.scoring.taylor import Taylor
from genkit.scoring.tree import Tree

POLICIES = ("race", "rounds", "exhaustive", "taylor", "dive", "tree")
RACING = ("race", "taylor", "dive", "tree")  # those that have an alpha
_KEEP, _FIRST = 5, 10  # of the published CIFAR-10 schedule: after a tenth of the pairs the best 5 classes stay


def plan_policy(
    name: str | Policy,
    plan: PairPlan,
    arms: int,
    *,
    cost: int | None = None,
    budget: int | None = None,
    alpha: float = 0.05,
    children: Mapping[int, tuple[int, ...]] | None = None,
) -> tuple[Policy, PairPlan]:
    """The policy of a name, or the given one, and the plan, both fitted to a budget.

    Args:
        name: "race" (paired tests), "rounds" (the published two rounds: 5 classes stay after a tenth of the pairs), "exhaustive",
            "taylor" (a gradient ranks, ten are raced), "dive" (gradients lead from class to class, those met are raced) or "tree"
            (races down a hierarchy).
        plan: "exhaustive" and "rounds" take fewer pairs of it where the budget wants that, so that those stay spread over all
            levels.
        arms: number of classes, groups of a hierarchy included.
        cost: evaluations that one pair of all of them takes; `arms` by default.
        budget: evaluations of an image, at most.
        alpha: of the races.
        children: arms of each group of the hierarchy, for "tree".

    Raises:
        ValueError: an unknown name, a tree without hierarchy or a hierarchy without tree, a budget below one pair for each class.
    """
    if isinstance(name, str) and name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    if not isinstance(name, str | Policy):
        raise ValueError(f"policy={name!r} is no policy. Give one of {', '.join(POLICIES)}, or an object of genkit.scoring.")
    if (name == "tree") != bool(children):
        what = (
            "needs a hierarchy: which classes each group prompt stands for" if name == "tree" else "takes no hierarchy; 'tree' does"
        )
        raise ValueError(f"The policy {name!r} {what}.")
    cost = arms if cost is None else cost
    if budget is not None and plan.timesteps is None and name in ("exhaustive", "rounds"):
        per_pair = cost if name == "exhaustive" else cost * (1 / _FIRST + min(1, _KEEP / arms) * (1 - 1 / _FIRST))
        plan = dataclasses.replace(plan, count=max(1, min(plan.count, int(budget / per_pair))))
    policy = name if isinstance(name, Policy) else _named(name, plan.count, alpha, children or {})
    if name == "dive" and budget is None:
        budget = cost * plan.count  # a search that goes badly must not cost more than scoring everything
    return (policy if budget is None else within(policy, budget, arms, cost)), plan


def _named(name: str, pairs: int, alpha: float, children: Mapping[int, tuple[int, ...]]) -> Policy:
    race = Race(alpha=alpha)
    if name == "rounds":
        return FixedRounds(to_keep=(_KEEP, 1), n_samples=(max(1, pairs // _FIRST), pairs)) if pairs > 1 else Exhaustive()
    if name == "taylor":
        return Taylor(pairs=min(Taylor.pairs, pairs), inner=race)
    if name == "dive":
        return Dive(proposer=Leaps(pairs=min(Leaps.pairs, pairs), first=min(Leaps.first, pairs), finalists=20), inner=race)
    if name == "tree":
        return Tree(children=children, inner=race)
    return race if name == "race" else Exhaustive()
