"""Which of the assemblies that were found differ, how good each is without the truth, and how sure one can be of the best.

Two assemblies are the same if parts of one shape can be exchanged so that each, but for a twentieth of the surface, lies within
`radius` (r.m.s., whatever its symmetry) of where it lies in the other. An assembly is judged by the energy of the search, by how
much of the template it covers and how much of its own surface lies on it, and by into how many pieces it falls. What the best one
is worth is said in one word:

    clear        no other is within 5 % of its energy
    ambiguous    others are
    poor         more than a tenth of the template is bare, or of the parts' surface lies elsewhere
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from genkit.assembly.imagined import Opinion
from genkit.assembly.parts import PartSet
from genkit.assembly.plausible import spanning_distances
from genkit.assembly.rigid import transform

if TYPE_CHECKING:
    from genkit.assembly.search import Search

RADIUS = 0.05  # in units of the longest side of a part
ELSEWHERE = 0.05  # share of the surface that may lie elsewhere in assemblies that are the same
NEAR = 0.05  # a place that is nearer than this counts as covered
TIE = 0.05  # share of the energy within which assemblies tie
POOR = 0.9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How sure one can be of the best assembly.

    Args:
        word: clear, ambiguous or poor.
        tied: assemblies whose scores are within 5 % of the best one's energy, with it.
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
    elsewhere = 0.0
    for shape, pool in zip(search.shapes, search.pools, strict=True):
        rows = torch.tensor(shape.members)
        y = transform(pool.anchors.points, a[rows]).flatten(1)
        images = transform(pool.anchors.images, b[rows][:, None]).flatten(2)
        apart = (y[:, None, None] - images[None]).square().sum(-1).amin(-1) / len(pool.anchors.points)
        i, j = linear_sum_assignment(apart.numpy())
        elsewhere += float(search.shares[rows[0]]) * int((apart[i, j] > radius**2).sum())
    return elsewhere <= ELSEWHERE


def judge(search: Search, parts: PartSet, poses: Tensor, opinion: Opinion | None = None) -> dict[str, Tensor]:
    """Scores of assemblies (H, P, 4, 4) on the template of a search.

    Args:
        opinion: of the model that made the template; a template that is a reference is trusted.

    Returns:
        `score` (H,), what they are ranked by, less is better: the energy, or F of `genkit.assembly.imagined` and its terms;
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
    energy = settler.energy(shaped)
    scores = {"energy": energy, "coverage": covered, "fit": fit, "pieces": pieces, "residual": residual}
    if opinion is None:
        return {"score": energy, **scores}
    return {**scores, **opinion.scores(search, poses, energy)}


def loose_pieces(parts: PartSet, pose: Tensor) -> int:
    """Into how many pieces an assembly (P, 4, 4) falls; parts whose samples come nearer than 0.05 hold together."""
    return 1 + int((spanning_distances(parts, pose) >= NEAR).sum())


def verdict(scores: dict[str, Tensor]) -> Verdict:
    """What the scores of distinct assemblies, best first, say of the first."""
    score = scores["score"].double()
    tied = int((score <= score[0] + TIE * float(scores["energy"][0])).sum())
    coverage, fit = float(scores["coverage"][0]), float(scores["fit"][0])
    if min(coverage, fit) < POOR:
        text = f"poor: {coverage:.0%} of the template is covered, {fit:.0%} of the parts' surface lies on it"
        return Verdict("poor", tied, text)
    if tied > 1:
        return Verdict("ambiguous", tied, f"ambiguous: {tied} hypotheses within {TIE:.0%}")
    return Verdict("clear", tied, "clear: no other hypothesis is near")
