"""Which of the assemblies that were found differ, how good each is without the truth, and how sure one can be of the best.

Parts of two assemblies agree, parts of one shape exchanged, if they lie within `radius` of each other (r.m.s., whatever their
symmetry). Assemblies are the same if all parts do but for a twentieth of the surface. An assembly is judged by the energy of the
search, by how much of the template it covers and how much of its own surface lies on it, and by into how many pieces it falls.

On what a model imagines none of the assemblies may be right as a whole, and the least score F may be right in less than others are.
The first is the one of which the most is to be expected (minimum Bayes risk: Kumar and Byrne 2004, aclanthology.org/N04-1022):

    A(g) = sum_k p_k (share of the parts of g that agree with g_k),     p = softmax(-F / T)

over the assemblies found. What the first one is worth is said in one word:

    clear        no other is better than it or within 5 % of its energy
    ambiguous    others are
    poor         more than a tenth of the template is bare, or of the parts' surface lies elsewhere
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
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
TEMPERATURE = 7e-4  # T, set on generated chairs of the validation split; there A of the first is about what is right of it


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How sure one can be of the best assembly.

    Args:
        word: clear, ambiguous or poor.
        tied: assemblies whose scores are better than the first one's or within 5 % of its energy, with it.
        text: the same in a sentence.
    """

    word: str
    tied: int
    text: str


@dataclasses.dataclass(frozen=True)
class Assemblies:
    """H assemblies that were found.

    Args:
        poses: (H, P, 4, 4), in units.
        scores: as `judge` gives them, the first axis H.
        scale: (H,), of the template that each was found on.
        templates: (H,), its number.
        history: of each, the poses (P, 4, 4) that it came from, one after the other.
    """

    poses: Tensor
    scores: dict[str, Tensor]
    scale: Tensor
    templates: Tensor
    history: list[list[Tensor]]

    @classmethod
    def ranked(
        cls, groups: Sequence[Assemblies], search: Search, parts: PartSet, count: int, opinion: Opinion | None
    ) -> Assemblies:
        """The best of those that were found on all templates, at most `count`; by agreement, if a model imagined the templates."""
        scores = {key: torch.cat([group.scores[key] for group in groups]) for key in groups[0].scores}
        poses, scale, templates = (
            torch.cat([getattr(group, name) for group in groups]) for name in ("poses", "scale", "templates")
        )
        if opinion is not None:
            poses = parts.centred(poses)  # where the origin is means nothing then
        best = cls(poses, scores, scale, templates, [steps for group in groups for steps in group.history])
        best = best.distinct(search) if len(groups) > 1 else best
        best = best[torch.arange(min(count, len(best.poses)))]
        if opinion is None:
            return best
        return dataclasses.replace(best, scores=opinion.closer(best.poses, best.scores)).by_agreement(search)

    def __getitem__(self, rows: Tensor) -> Assemblies:
        scores = {key: value[rows] for key, value in self.scores.items()}
        return Assemblies(
            self.poses[rows], scores, self.scale[rows], self.templates[rows], [self.history[i] for i in rows.tolist()]
        )

    def distinct(self, search: Search) -> Assemblies:
        """Those that differ, the least score first."""
        found = self[self.scores["score"].argsort(stable=True)]
        return found[torch.tensor(distinct(search, found.poses))]

    def by_agreement(self, search: Search) -> Assemblies:
        """The same with `agreement` among the scores, the most first."""
        agree = agreement(search, self.poses, self.scores["score"])
        scores = {**self.scores, "agreement": agree}
        return dataclasses.replace(self, scores=scores)[agree.argsort(descending=True, stable=True)]


def distinct(search: Search, poses: Tensor, radius: float = RADIUS) -> list[int]:
    """Of assemblies (H, P, 4, 4), best first, the rows of those that differ from all better ones."""
    shaped = [search.to_shapes(pose) for pose in poses]
    kept: list[int] = []
    for h in range(len(poses)):
        if not any(_same(search, shaped[h], shaped[k], radius) for k in kept):
            kept.append(h)
    return kept


def agreement(search: Search, poses: Tensor, score: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """A (H,) of assemblies (H, P, 4, 4) of scores F (H,): what share of its parts lie as in the likely ones, in [0, 1]."""
    shaped, likely = [search.to_shapes(pose) for pose in poses], (-score.double() / temperature).softmax(0)
    agree = torch.eye(len(poses), dtype=torch.float64)
    for h, k in itertools.combinations(range(len(poses)), 2):
        agree[h, k] = agree[k, h] = sum(_agreeing(search, shaped[h], shaped[k], RADIUS)) / len(search.parts)
    return agree @ likely


def _same(search: Search, a: Tensor, b: Tensor, radius: float) -> bool:
    elsewhere = sum(
        float(search.shares[shape.members[0]]) * (len(shape.members) - count)
        for shape, count in zip(search.shapes, _agreeing(search, a, b, radius), strict=True)
    )
    return elsewhere <= ELSEWHERE


def _agreeing(search: Search, a: Tensor, b: Tensor, radius: float) -> list[int]:
    """Of each shape, how many parts of two assemblies (P, 4, 4), in poses of the shapes, can be matched."""
    counts = []
    for shape, pool in zip(search.shapes, search.pools, strict=True):
        rows = torch.tensor(shape.members)
        y = transform(pool.anchors.points, a[rows]).flatten(1)
        images = transform(pool.anchors.images, b[rows][:, None]).flatten(2)
        apart = (y[:, None, None] - images[None]).square().sum(-1).amin(-1) / len(pool.anchors.points)
        elsewhere = (apart > radius**2).numpy()
        i, j = linear_sum_assignment(elsewhere)
        counts.append(len(i) - int(elsewhere[i, j].sum()))
    return counts


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
        word, text = "poor", f"{coverage:.0%} of the template is covered, {fit:.0%} of the parts' surface lies on it"
    elif tied > 1:
        word, text = "ambiguous", f"{tied} hypotheses within {TIE:.0%}"
    else:
        word, text = "clear", "no other hypothesis is near"
    if "agreement" in scores and len(score) > 1:
        text += f"; the likely ones agree on {float(scores['agreement'][0]):.0%} of its parts"
    return Verdict(word, tied, f"{word}: {text}")
