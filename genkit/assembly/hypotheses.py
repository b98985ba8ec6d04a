"""Which of the assemblies that were found differ, how good each is without the truth, and how sure one can be of the best.

Two assemblies are the same if parts of one shape can be exchanged so that each lies within `radius` (r.m.s., whatever its
symmetry) of where it lies in the other. An assembly is judged by the energy of the search, by how much of the template it covers
and how much of its own surface lies on it, and by into how many pieces it falls. What the best one is worth is said in one word:

    clear        no other is within 5 % of its energy
    ambiguous    others are
    poor         more than a tenth of the template is bare, or of the parts' surface lies elsewhere
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree
from torch import Tensor

from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import transform

if TYPE_CHECKING:
    from genkit.assembly.search import Search

RADIUS = 0.05  # in units of the longest side of a part
NEAR = 0.05  # a place that is nearer than this counts as covered
TIE = 0.05  # share of the energy within which assemblies tie
POOR = 0.9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How sure one can be of the best assembly.

    Args:
        word: clear, ambiguous or poor.
        tied: assemblies within 5 % of the best one's energy, with it.
        text: the same in a sentence.
    """

    word: str
    tied: int
    text: str


def distinct(search: Search, poses: Tensor, radius: float = RADIUS) -> list[int]:
    """Of assemblies (H, P, 4, 4), best first, the rows of those that differ from all better ones."""
    shaped = [search.to_shapes(pose) for pose in poses]
    kept: list[int] = []
    for h in range(len(poses)):
        if not any(_same(search, shaped[h], shaped[k], radius) for k in kept):
            kept.append(h)
    return kept


def _same(search: Search, a: Tensor, b: Tensor, radius: float) -> bool:
    for shape, pool in zip(search.shapes, search.pools, strict=True):
        rows = torch.tensor(shape.members)
        y = transform(pool.anchors.points, a[rows]).flatten(1)
        images = transform(pool.anchors.images, b[rows][:, None]).flatten(2)
        apart = (y[:, None, None] - images[None]).square().sum(-1).amin(-1) / len(pool.anchors.points)
        i, j = linear_sum_assignment(apart.numpy())
        if apart[i, j].max() > radius**2:
            return False
    return True


def judge(search: Search, parts: PartSet, poses: Tensor) -> dict[str, Tensor]:
    """Scores of assemblies (H, P, 4, 4) on the template of a search.

    Returns:
        `energy` (H,), less is better; `coverage` (H,), the share of the template within 0.05 of a part; `fit` (H,), the share of
        the parts' surface within 0.05 of the template; `pieces` (H,), into how many the assembly falls; `residual` (H, P), r.m.s.
        distance of each part to the template in units, cut off at tau.
    """
    shaped = torch.stack([search.to_shapes(pose) for pose in poses])
    settler = search.exact
    _, squared, _ = settler.covers(shaped)
    y = transform(settler.x, shaped)
    off = search.grid.squared(y, settler.normals @ shaped[..., :3, :3].mT)
    residual = torch.empty(poses.shape[:2])
    residual[:, search.order] = off.mean(-1).sqrt()
    fit = ((off < NEAR**2).float().mean(-1) * search.shares).sum(-1)
    pieces = torch.tensor([loose_pieces(parts, pose) for pose in poses])
    covered = (squared.amin(-2) < NEAR**2).float().mean(-1)
    return {"energy": settler.energy(shaped), "coverage": covered, "fit": fit, "pieces": pieces, "residual": residual}


def loose_pieces(parts: PartSet, pose: Tensor) -> int:
    """Into how many pieces an assembly (P, 4, 4) falls; parts whose samples come nearer than 0.05 hold together."""
    trees = [KDTree(points.numpy()) for points in transform(parts.points.double(), pose.double())]
    touching = np.zeros((len(trees), len(trees)))
    for i, j in itertools.combinations(range(len(trees)), 2):
        distance, _ = trees[i].query(trees[j].data, distance_upper_bound=NEAR)
        touching[i, j] = distance.min() < NEAR
    return int(connected_components(touching, directed=False)[0])


def verdict(scores: dict[str, Tensor]) -> Verdict:
    """What the scores of distinct assemblies, best first, say of the first."""
    energy = scores["energy"].double()
    tied = int((energy <= energy[0] * (1 + TIE)).sum())
    coverage, fit = float(scores["coverage"][0]), float(scores["fit"][0])
    if min(coverage, fit) < POOR:
        text = f"poor: {coverage:.0%} of the template is covered, {fit:.0%} of the parts' surface lies on it"
        return Verdict("poor", tied, text)
    if tied > 1:
        return Verdict("ambiguous", tied, f"ambiguous: {tied} hypotheses within {TIE:.0%}")
    return Verdict("clear", tied, "clear: no other hypothesis is near")
