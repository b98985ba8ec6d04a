"""Choices of whole pairs: each part together with its mirror image, or across the plane.

A pattern says of each shape how many pairs its parts make; then the choice is that of `genkit.assembly.selection`, of pairs and
single parts for parts: a pair covers what either covers, and its density is the sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkit.assembly.mirror import Mirror
from genkit.assembly.selection import Costs, choose, improve_pairs

KEPT = 3  # choices of each pattern

Key = tuple[int, bool]  # a shape, and whether in pairs
Measured = tuple[Tensor, Tensor, Tensor]  # cover (K, M), density (K, M) and residual (K,) of poses (K, 4, 4)


class PairChoice:
    """Candidates of the shapes of an object in pairs and across the plane.

    Args:
        members: of each shape.
        own: of each shape, the axis along which it is its own mirror image, if it is.
        parted: of each shape's candidates, those across the plane and those in pairs (K, 4, 4).
        measure: what poses of a shape have on the template.
    """

    def __init__(
        self, members: Sequence[list[int]], own: Sequence[int | None], parted: Sequence[tuple[Tensor, Tensor]], mirror: Mirror,
        measure: Callable[[int, Tensor], Measured],
    ) -> None:  # fmt: skip
        self.members = members
        self.poses: dict[Key, list[Tensor]] = {}
        self.measured: dict[Key, Measured] = {}
        for k, (single, one) in enumerate(parted):
            axis = own[k]
            for paired, poses in ((False, single), (True, one)):
                if len(poses) == 0:
                    continue
                every = [poses, mirror.poses(poses, axis)] if paired and axis is not None else [poses]
                values = [measure(k, placed) for placed in every]
                cover, density, lies = (torch.stack(v) for v in zip(*values, strict=True))
                self.poses[k, paired] = every
                self.measured[k, paired] = cover.amin(0), density.sum(0), lies.mean(0)

    def patterns(self, count: int, generator: torch.Generator) -> list[list[int]]:
        """Of each shape the number of pairs, at most `count` times: as many as can be first; at random where there are more."""
        options = [
            [
                pairs
                for pairs in range(len(rows) // 2, -1, -1)
                if (pairs == 0 or (k, True) in self.poses) and (2 * pairs == len(rows) or (k, False) in self.poses)
            ]
            for k, rows in enumerate(self.members)
        ]
        if math.prod(len(some) for some in options) <= count:
            return [list(pattern) for pattern in itertools.product(*options)]
        drawn = [[some[int(torch.randint(len(some), (1,), generator=generator))] for some in options] for _ in range(count - 1)]
        return [[some[0] for some in options], *drawn]

    def costs(self, pattern: Sequence[int], like: Costs) -> tuple[Costs, list[tuple[Key, list[int]]]]:
        """The costs of a pattern, and what its units are: their candidates and the parts."""
        units: list[tuple[Key, list[int]]] = []
        for k, pairs in enumerate(pattern):
            rows = self.members[k]
            units += [((k, True), rows[2 * i : 2 * i + 2]) for i in range(pairs)]
            units += [((k, False), [i]) for i in rows[2 * pairs :]]
        keys = sorted({key for key, _ in units})
        cover, density, lies = (list(v) for v in zip(*(self.measured[key] for key in keys), strict=True))
        shares = torch.stack([like.shares[rows].sum() for _, rows in units])
        of = [keys.index(key) for key, _ in units]
        return Costs(cover, density, lies, of, shares, like.target, like.limit, like.residual_weight, like.density_weight), units

    def choose(self, like: Costs, count: int, starts: int, beam: int, generator: torch.Generator) -> Tensor:
        """Assemblies (H, P, 4, 4), the best `beam` of all patterns."""
        found = []
        for pattern in self.patterns(count, generator):
            costs, units = self.costs(pattern, like)
            found += [(energy, choice, costs, units) for energy, choice in choose(costs, starts, generator)[:KEPT]]
        found.sort(key=lambda one: one[0])
        assemblies = torch.zeros(min(beam, len(found)), len(like.shape_of), 4, 4)
        for assembly, (_, choice, costs, units) in zip(assemblies, found, strict=False):
            for k, (key, rows) in zip(improve_pairs(costs, choice), units, strict=True):
                for i, poses in zip(rows, self.poses[key], strict=True):
                    assembly[i] = poses[k]
        return assemblies
