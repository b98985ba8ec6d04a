"""How a label is found: which classes (arms) are scored on which pairs, decided from the losses that came back.

A policy is written for one image as a generator, which asks for losses and gets them; it knows nothing of networks and batches:

    losses = yield Request(arms, pairs)

Published schedules are `Exhaustive` and `FixedRounds` (Li et al. 2023, arXiv 2303.16203, section 3.3).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Request:
    """Losses that are wanted: of `arms` (n,) on `pairs` (n,), item by item."""

    arms: np.ndarray
    pairs: np.ndarray


@dataclasses.dataclass(frozen=True)
class SlopeRequest:
    """The derivative of the loss in the weight of each arm is wanted, at the mean of `arms` and averaged over `pairs`."""

    arms: np.ndarray
    pairs: np.ndarray


@dataclasses.dataclass(frozen=True)
class GradientRequest:
    """Losses of `arms` (n,) on `pairs` (n,), each with its gradient in the arm's embedding: (n, 1 + D), the loss first.

    With `offset` (n, D) at points that lie so far from the arms' embeddings.
    """

    arms: np.ndarray
    pairs: np.ndarray
    offset: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """The embeddings of `arms` (n,) are wanted, a `genkit.inversion.Vocabulary`; they cost no evaluation."""

    arms: np.ndarray


_SHARED = 10

Wanted = Request | SlopeRequest | GradientRequest | EmbeddingRequest
Search = Generator[Wanted, Any, "Verdict"]
Narrowing = Generator[Wanted, Any, list[int]]


@dataclasses.dataclass(frozen=True)
class Round:
    """What a policy knew at one moment: the arms left (best first), their mean losses, and the number of pairs they had seen."""

    pairs: int
    arms: list[int]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome for one image.

    Args:
        label: the winning arm.
        scores: (K,) mean weighted loss of each arm, lower is better: the winner's own mean, plus the mean paired difference on the
            pairs that both saw. Infinite for an arm that was never scored.
        counts: (K,) pairs that each arm was scored on.
        evaluations: network evaluations, a backward pass counted as one.
        error_bound: bound on the probability that scoring every pair of the plan would give another label, for paired differences
            that are about normal; 0 where every pair was scored.
        rounds: the course of the search.
    """

    label: int
    scores: np.ndarray
    counts: np.ndarray
    evaluations: int
    error_bound: float
    rounds: list[Round]


class Board:
    """The losses of one image so far.

    Args:
        u: (N,) fraction of time of each pair of the plan.
        offsets: (K,) what is added to every loss of an arm, for priors.
        groups: (K,) class of each arm, where a class has several; a search ends when one class is left.
        costs: (K,) network evaluations that a loss of each arm takes.
    """

    def __init__(
        self, u: np.ndarray, offsets: np.ndarray, groups: np.ndarray | None = None, costs: np.ndarray | None = None
    ) -> None:
        self.u, self.offsets = u, offsets
        self.costs = np.ones(len(offsets), dtype=int) if costs is None else costs
        self.groups = np.arange(len(offsets)) if groups is None else groups
        self.losses = np.full((len(offsets), len(u)), np.nan)
        self.gradients: dict[tuple[int, int], np.ndarray] = {}  # by arm and pair
        self.rounds: list[Round] = []
        self.evaluations = 0
        self.dropped: dict[int, float] = {}  # p-value at which a test dropped an arm
        self.looks = 1  # how often it was tested

    def score(self, arms: Sequence[int], pairs: Sequence[int] | np.ndarray) -> Generator[Request, np.ndarray, None]:
        """Score every arm on every pair; what is known already is not asked for again."""
        wanted = [(arm, pair) for pair in pairs for arm in arms if np.isnan(self.losses[arm, pair])]
        if wanted:
            grid = np.array(wanted)
            answer = yield Request(grid[:, 0], grid[:, 1])
            self.losses[grid[:, 0], grid[:, 1]] = answer + self.offsets[grid[:, 0]]
            self.evaluations += int(self.costs[grid[:, 0]].sum())

    def differentiate(
        self, arms: Sequence[int], pairs: Sequence[int] | np.ndarray
    ) -> Generator[GradientRequest, np.ndarray, np.ndarray]:
        """Gradients (n, D) of every arm's mean loss over the pairs, in its embedding; the losses are on the board then.

        What is known already is not asked for again.
        """
        wanted = [(arm, int(pair)) for arm in dict.fromkeys(arms) for pair in pairs if (arm, int(pair)) not in self.gradients]
        if wanted:
            grid = np.array(wanted)
            answer = yield GradientRequest(grid[:, 0], grid[:, 1])
            known = self.losses[grid[:, 0], grid[:, 1]]
            self.losses[grid[:, 0], grid[:, 1]] = np.where(np.isnan(known), answer[:, 0] + self.offsets[grid[:, 0]], known)
            self.gradients |= dict(zip(wanted, answer[:, 1:], strict=True))
            self.evaluations += 2 * int(self.costs[grid[:, 0]].sum())
        return np.stack([np.mean([self.gradients[arm, int(pair)] for pair in pairs], axis=0) for arm in arms])

    def means(self, arms: Sequence[int]) -> np.ndarray:
        """Mean loss (n,) of each arm over the pairs that all of `arms` have seen; infinite if there are none."""
        rows = self.losses[list(arms)]
        common = ~np.isnan(rows).any(0)
        return rows[:, common].mean(1) if common.any() else np.full(len(arms), np.inf)

    def ranked(self, arms: Sequence[int]) -> list[int]:
        """The arms, best first; ties in their order."""
        return [arms[i] for i in np.argsort(self.means(arms), kind="stable")]

    def best(self, arms: Sequence[int], keep: int) -> list[int]:
        """The best arms that belong to at most `keep` classes, best first."""
        order = self.ranked(arms)
        classes = list(dict.fromkeys(int(self.groups[arm]) for arm in order))[:keep]
        return [arm for arm in order if self.groups[arm] in classes]

    def note(self, arms: Sequence[int]) -> None:
        """Add a round to the record."""
        order = self.ranked(arms)
        seen = int((~np.isnan(self.losses[order])).all(0).sum())
        self.rounds.append(Round(seen, order, self.means(order).tolist()))

    def distinct(self, arms: Sequence[int]) -> int:
        """How many classes the arms belong to."""
        return len(np.unique(self.groups[list(arms)]))

    def differences(self, arms: Sequence[int], leader: int) -> np.ndarray:
        """Paired differences (n, m) to the leader on the m pairs that all have seen, by increasing u."""
        rows = self.losses[[leader, *arms]]
        common = np.flatnonzero(~np.isnan(rows).any(0))
        common = common[np.argsort(self.u[common], kind="stable")]
        return rows[1:, common] - rows[:1, common]

    def p_values(self, arms: Sequence[int], leader: int) -> np.ndarray:
        """One-sided p-value (n,) of each arm being no worse than the leader over the whole plan, by a t-test on paired differences.

        Three things make it sharper than the plain test, which can hardly reject after 8 pairs:
        - Pairs are spread evenly over time, so the mean's error is what neighbours in time differ by, not what the difference
          changes by over time: s_j^2 = sum (D_(i+1) - D_i)^2 / 2 (m - 1) (von Neumann 1941), with 2 (m - 1)^2 / (3 m - 4)
              degrees of freedom.
        - The arms tell about each other's variance: s_j^2 is shrunk to the arms' mean with the weight of `_SHARED` degrees of
          freedom (the moderated t of Smyth 2004).
        - The pairs are part of a plan of N, not of an endless supply: 1 - m / N.
        """
        difference = self.differences(arms, leader)
        m = difference.shape[1]
        if m < 2 or not len(arms):
            return np.ones(len(arms))
        mean = difference.mean(1)
        variance = (np.diff(difference, axis=1) ** 2).sum(1) / (2 * (m - 1))
        freedom = 2 * (m - 1) ** 2 / (3 * m - 4)
        if len(arms) > 1:
            variance = (_SHARED * variance.mean() + freedom * variance) / (_SHARED + freedom)
            freedom += _SHARED
        error = np.sqrt(variance / m * (1 - m / len(self.u)))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(error > 0, mean / error, np.sign(mean) * np.inf)
        # A tie over the whole plan is 0 * inf.
        return np.where(np.isnan(t), 0.5, stats.t.sf(t, freedom))

    def verdict(self, arm: int) -> Verdict:
        """The outcome, with `arm` as the winner."""
        counts = (~np.isnan(self.losses)).sum(1)
        scores = np.full(len(counts), np.inf)
        others = [int(j) for j in np.flatnonzero(counts) if j != arm]
        scores[arm] = np.nanmean(self.losses[arm])
        for j in others:
            gap = self.losses[j] - self.losses[arm]
            # Arms of a tree may have no pair in common with the winner.
            scores[j] = scores[arm] + np.nanmean(gap) if (~np.isnan(gap)).any() else np.nanmean(self.losses[j])
        rivals = [j for j in others if self.groups[j] != self.groups[arm]]
        doubts = [self.dropped[j] if j in self.dropped else float(self.p_values([j], arm)[0]) for j in rivals]
        bound = sum(doubts) * self.looks
        return Verdict(arm, scores, counts, self.evaluations, min(1.0, bound), self.rounds)


class Policy(ABC):
    """A way to find the best arm."""

    @abstractmethod
    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        """Reduce `arms` to at most `keep` classes' arms; returns them, best first."""

    def search(
        self,
        arms: int,
        u: np.ndarray,
        *,
        offsets: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        costs: np.ndarray | None = None,
    ) -> Search:
        """Find the best of `arms` arms on the pairs at times u (N,); a generator, see the top of this file.

        The other arguments are those of `Board`.

        Raises:
            ValueError: fewer than two arms, or a plan that the policy cannot work with.
        """
        if arms < 2:
            raise ValueError(f"There is nothing to decide between {arms} classes. Give at least two.")
        self.check(arms, len(u))
        board = Board(u, np.zeros(arms) if offsets is None else np.asarray(offsets, dtype=float), groups, costs)
        left = yield from self.narrow(board, self.entrants(arms), 1)
        return (yield from self.conclude(board, left[0]))

    def conclude(self, board: Board, arm: int) -> Search:
        """The verdict with `arm` as the winner; may ask for more losses."""
        yield from ()
        return board.verdict(arm)

    def entrants(self, arms: int) -> list[int]:
        """The arms that the search begins with."""
        return list(range(arms))

    def check(self, arms: int, pairs: int) -> None:  # noqa: B027  (nothing to check is a valid answer)
        """Raise ValueError for numbers of arms and pairs that the policy cannot work with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exhaustive(Policy):
    """Every arm on every pair."""

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        yield from board.score(arms, range(len(board.u)))
        board.note(arms)
        return board.best(arms, keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedRounds(Policy):
    """The published schedule: after `n_samples[i]` pairs the best `to_keep[i]` arms stay.

    Args:
        to_keep: arms after each round, falling; the last should be 1. CIFAR-10 has (5, 1), ImageNet (500, 50, 10, 1).
        n_samples: pairs that an arm has been meant to see after each round. CIFAR-10 has (50, 500), ImageNet (50, 100, 500, 1000).
        nested: True takes the first n pairs of the plan. False does what the published code does on an evenly spaced plan
            (`PairPlan.reference`): each round has a grid of its own, whose points mostly are no points of the round before, so an
            arm sees more than n pairs, up to a quarter more in all.

    Raises:
        ValueError: lists of different lengths, or numbers that do not fall and rise.

    Example:
        >>> FixedRounds(to_keep=(5, 1), n_samples=(50, 500), nested=False)     # 2,750 evaluations for 10 classes
    """

    to_keep: tuple[int, ...] = (5, 1)
    n_samples: tuple[int, ...] = (50, 500)
    nested: bool = True

    def __post_init__(self) -> None:
        keep, count = list(self.to_keep), list(self.n_samples)
        if not keep or len(keep) != len(count):
            raise ValueError(f"to_keep={self.to_keep} and n_samples={self.n_samples} must have one entry for each round.")
        if sorted(set(count)) != count or count[0] < 1 or sorted(set(keep), reverse=True) != keep or keep[-1] < 1:
            raise ValueError(f"n_samples={self.n_samples} must rise and to_keep={self.to_keep} fall, and both be positive.")

    def check(self, arms: int, pairs: int) -> None:
        if self.n_samples[-1] > pairs:
            raise ValueError(
                f"The last round wants {self.n_samples[-1]} pairs, but the plan has {pairs}. Give PairPlan a larger count."
            )

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        most = self.n_samples[-1]
        for to_keep, n in zip(self.to_keep, self.n_samples, strict=True):
            step = most // n
            grid = range(n) if self.nested else range(step // 2, most, step)[:n]
            yield from board.score(arms, grid)
            board.note(arms)
            arms = board.ranked(arms)[: max(to_keep, keep)]
        return board.best(arms, keep)
