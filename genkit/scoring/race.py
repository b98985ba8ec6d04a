"""Race: stop scoring a class as soon as it is beaten beyond doubt.

After n common pairs let D_j = loss_j - loss_leader. Arm j is dropped if the one-sided test of "j is no worse" over the whole
plan has

    p_j < alpha / (looks (k - 1)),        k arms left,

Bonferroni's correction for the arms that might lead and for the looks: each look spends alpha / looks, so the best arm of the
plan is lost with a probability of at most alpha, for differences that are about normal (see `Board.p_values` for the test).
Racing of this kind goes back to Maron & Moore 1994; Clark & Jaini 2023 (arXiv 2303.15233) use a paired t-test on diffusion
losses.
"""

from __future__ import annotations

import dataclasses
import math

from genkit.scoring.policy import Board, Narrowing, Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race(Policy):
    """Drop arms by a paired test.

    Args:
        alpha: probability of losing the arm that is the best over the whole plan, at most.
        floor: pairs that every arm is scored on before the first look. Below about 6 the test can hardly reject.
        growth: an arm has seen this many times as many pairs at each look as at the one before.
        cap: pairs that no arm goes beyond; the whole plan by default. The best mean wins then, and the error bound says how sure
            it is.

    Raises:
        ValueError: alpha outside 0 to 1, a floor below 2, a growth of at most 1, a cap below the floor.

    Example:
        >>> verdict = next(scorer.run(x0, cond, Race(alpha=0.05)))[1]
        >>> verdict.label, verdict.error_bound, verdict.evaluations
    """

    alpha: float = 0.05
    floor: int = 8
    growth: float = 1.2
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is no probability. Give a number between 0 and 1, such as 0.05.")
        if self.floor < 2 or self.growth <= 1:
            raise ValueError(f"A race needs floor >= 2 and growth > 1, got {self.floor} and {self.growth}.")
        if self.cap is not None and self.cap < self.floor:
            raise ValueError(f"cap={self.cap} is below floor={self.floor}. Raise it, or lower the floor.")

    def looks(self, pairs: int) -> list[int]:
        """How many pairs an arm has seen at each look."""
        most = min(pairs, self.cap or pairs)
        counts = [min(self.floor, most)]
        while counts[-1] < most:
            counts.append(min(most, math.ceil(counts[-1] * self.growth)))
        return counts

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        counts = self.looks(len(board.u))
        board.looks = len(counts)
        for n in counts:
            yield from board.score(arms, range(n))
            arms = board.ranked(arms)
            board.note(arms)
            threshold = self.alpha / (len(counts) * max(1, len(arms) - 1))
            p = dict(zip(arms[1:], board.p_values(arms[1:], arms[0]), strict=True))
            left = [arms[0], *(arm for arm, value in p.items() if value >= threshold)]
            # Never fewer classes than may stay: the runners-up are wanted too.
            left = left if board.distinct(left) >= keep else board.best(arms, keep)
            board.dropped |= {arm: p[arm] for arm in arms if arm not in left}
            arms = left
            if board.distinct(arms) <= keep:
                break
        return board.best(arms, keep)
