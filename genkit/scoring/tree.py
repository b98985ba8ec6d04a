"""Tree: decide between groups of classes first, then within the best group.

A group has a condition of its own ("a seven" for all red, blue, ... sevens), so K classes in groups of about sqrt(K) cost about
2 sqrt(K) arms instead of K. With a wrong hierarchy the answer is wrong: the error bound is that of the last decision alone
(hierarchical diffusion classifier: arXiv 2411.12073).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from genkit.scoring.policy import Board, Narrowing, Policy
from genkit.scoring.race import Race


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree(Policy):
    """Search a hierarchy of arms from the top.

    Args:
        children: arms below each group's arm. Groups may contain groups; every arm but those at the top lies in one group or more.
        beam: groups that are followed at each depth.
        inner: how arms of one depth are compared.

    Raises:
        ValueError: no groups, an empty one, a beam below 1, a group below itself.

    Example:
        >>> Tree(children={10: (0, 1, 2), 11: (3, 4, 5)})       # arms 10 and 11 are groups of arms 0 to 5
    """

    children: Mapping[int, tuple[int, ...]]
    beam: int = 1
    inner: Policy = dataclasses.field(default_factory=Race)

    def __post_init__(self) -> None:
        if not self.children or not all(self.children.values()):
            raise ValueError("A tree needs groups, and each at least one class.")
        if self.beam < 1:
            raise ValueError(f"beam={self.beam} follows no group. Give at least 1.")
        if not self._top() or self._depth(self._top(), 0) is None:
            raise ValueError("The hierarchy has a group below itself. Take it out.")

    def _top(self) -> list[int]:
        below = {arm for arms in self.children.values() for arm in arms}
        return [arm for arm in self.children if arm not in below]

    def _depth(self, arms: list[int], depth: int) -> int | None:
        """Depth of the tree; None if it does not end."""
        following = [child for arm in arms for child in self.children.get(arm, ())]
        if not following:
            return depth
        return None if depth > len(self.children) else self._depth(following, depth + 1)

    @property
    def levels(self) -> int:
        """How many comparisons a search makes, at most."""
        depth = self._depth(self._top(), 0)
        assert depth is not None
        return depth + 1

    def check(self, arms: int, pairs: int) -> None:
        named = set(self.children) | {arm for group in self.children.values() for arm in group}
        missing = sorted(set(range(arms)) - named)
        if missing or max(named) >= arms:
            what = f"class {missing[0]} is in no group" if missing else f"there is no arm {max(named)}"
            raise ValueError(f"The hierarchy does not fit the {arms} arms: {what}.")
        self.inner.check(arms, pairs)

    def entrants(self, arms: int) -> list[int]:
        return self._top()

    def narrow(self, board: Board, arms: list[int], keep: int) -> Narrowing:
        while any(arm in self.children for arm in arms):
            groups = arms if len(arms) <= self.beam else (yield from self.inner.narrow(board, arms, self.beam))
            arms = list(dict.fromkeys(child for arm in groups for child in self.children.get(arm, (arm,))))
        if len(arms) == 1:
            yield from board.score(arms, range(1))
            return arms
        return (yield from self.inner.narrow(board, arms, keep))
