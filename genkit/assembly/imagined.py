"""Templates without a reference: what a diffusion model imagines of some parts, and what it makes of their assembly, in turn.

    S_0 = a sample of the category,    g_r = search(S_r),    S_{r+1} = D(Y(g_r); h_r),    h falling

The model is told the parts, if it takes them (`genkit.assembly.descriptors`). D noises the assembly to the level h and denoises it
(SDEdit: Meng et al. 2021, arXiv 2108.01073): it has the parts' own sizes, and what is impossible about it goes. Assemblies are
compared by

    F(g) = E(g; S) + 0.2 surprise(g) + asymmetry(g) + 0.01 overlap(g) + 0.01 gap(g)

(0.02 surprise of a model that is not told the parts). E is the search's energy; surprise the model's error at low noise,
|eps - eps_theta|^2, on the same noise for all; the others are those of `genkit.assembly.mirror`, where the samples have a plane,
and of `genkit.assembly.plausible`.

A network that sees the whole set draws the middle of its category where it is given many more points than it was trained on, since
their noise averages out; with as many as it was trained on, clouds differ as furniture does. Half of the samples of a model that is
not told the parts are of each kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from genkit.assembly.mirror import mirror_axis
from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import PartSet
from genkit.assembly.plausible import gap, overlap, pulled
from genkit.assembly.point_model import PointModel
from genkit.assembly.rigid import transform
from genkit.assembly.search import Search
from genkit.assembly.search_config import SearchConfig
from genkit.assembly.surfaces import part_surface, template_surface
from genkit.noise import mix

Template = tuple[Surface, float, Tensor]  # in units, the scale to the lengths of the model or a reference, and the centre
POINTS, FEW = 2048, 512  # of a template, and of such a cloud at most
ROUNDS = (0.7, 0.35)  # h of each; a model that is told the parts draws their sizes at once, and the first is left out
FINAL = 0.35
CLOUDS, MANY = 16, 64  # of an assembly, that the model is asked about, and of one that is returned: fewer tell by their noise
TRIED = 3  # assemblies on each template
WEIGHTS = {"surprise": 0.2, "overlap": 0.01, "gap": 0.01, "asymmetry": 1.0}
UNTOLD = 0.02  # weight of the surprise of a model that is not told the parts; all set on generated objects of the validation split
QUICK = SearchConfig(
    candidates=64, rotations=64, voxel=0.06, starts=8, beam=4, rounds=1, renewed=1, exchanges=2, coarse=384, fine=512, last=2048,
    resolution=64,
)  # fmt: skip


class Opinion:
    """What a model and common sense say of assemblies of some parts.

    Args:
        category: that the model is told.
        samples: of the model, as templates in units.
        deviation: standard deviation of the model's clouds, over points and axes together, where it does not tell their scale.

    Example:
        >>> Opinion(parts, model, "chair", templates).scores(search, poses, search.energy(poses))["surprise"]
    """

    def __init__(
        self, parts: PartSet, model: PointModel, category: str | int | None, samples: Sequence[Surface], deviation: float = 1.0
    ) -> None:
        self.parts, self.model, self.category, self.deviation = parts, model, category, deviation
        self.surfaces = [part_surface(parts, i) for i in range(len(parts))]
        self.axis = mirror_axis(samples)
        self.weights = WEIGHTS | ({"surprise": UNTOLD} if model.parts is None else {})

    def cloud(self, pose: Tensor, count: int, seed: int) -> tuple[Tensor, float]:
        """Area-uniform samples (count, 3) of an assembly (P, 4, 4) as the model knows clouds, and their scale."""
        return self._sampled(transform(self.parts.points.double(), pose.double()), count, seed)

    def _sampled(self, placed: Tensor, count: int, seed: int) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(mix(seed, 5))
        owner = torch.multinomial(self.parts.areas / self.parts.areas.sum(), count, replacement=True, generator=generator)
        rows = torch.randint(self.parts.points.shape[1], (count,), generator=generator)
        y = placed[owner, rows].float()
        centre = y.mean(0)
        scale = self.model.scale or self.deviation / float((y - centre).square().mean().sqrt())
        return (y - centre) * scale, scale

    def surprise(self, pose: Tensor, count: int = CLOUDS) -> float:
        """What the model makes of clouds of an assembly (P, 4, 4), `count` of them."""
        size = min(getattr(self.model.denoiser.config, "sample_size", FEW), FEW)
        placed = transform(self.parts.points.double(), pose.double())
        clouds = torch.stack([self._sampled(placed, size, seed)[0] for seed in range(count)])
        return self.model.surprise(clouds, self.category)

    def scores(self, search: Search, poses: Tensor, energy: Tensor) -> dict[str, Tensor]:
        """`score` (F), `surprise`, `overlap`, `gap` and `asymmetry` (H,) of assemblies (H, P, 4, 4) of an energy (H,)."""
        rows = [(self.surprise(pose), overlap(self.parts, self.surfaces, pose), gap(self.parts, pose)) for pose in poses]
        surprised, inside, apart = torch.tensor(rows).unbind(1)
        terms = {"surprise": surprised, "overlap": inside, "gap": apart, "asymmetry": search.asymmetry(poses)}
        return {"score": energy + sum(weight * terms[name] for name, weight in self.weights.items()), **terms}

    def closer(self, poses: Tensor, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same scores of assemblies (H, P, 4, 4), with the surprise of many clouds."""
        surprised = torch.tensor([self.surprise(pose, MANY) for pose in poses])
        score = scores["score"] + self.weights["surprise"] * (surprised - scores["surprise"])
        return {**scores, "score": score, "surprise": surprised}


@dataclasses.dataclass(frozen=True, eq=False)
class _Idea:
    template: Surface
    scale: float
    pose: Tensor
    total: float


def samples(model: PointModel, count: int, category: str | int | None, *, steps: int, seed: int) -> Tensor:
    """Clouds (count, 2048, 3) of a category; every other one drawn with as many points as the model was trained on, if it is not
    told the parts.
    """
    size = getattr(model.denoiser.config, "sample_size", None)
    if size is None or size >= POINTS or count == 1 or model.parts is not None:
        return model.generate(count, category, points=POINTS, steps=steps, seed=seed)
    middle = model.generate(-(-count // 2), category, points=POINTS, steps=steps, seed=seed)
    few = model.generate(count // 2, category, points=size, steps=steps, seed=mix(seed, 6))
    repeated = [cloud.repeat(-(-POINTS // size), 1)[None, :POINTS] for cloud in few]
    many = [model.renewed(cloud, FINAL, category, steps=_whole(steps), seed=mix(seed, i))[0] for i, cloud in enumerate(repeated)]
    clouds = torch.empty(count, POINTS, 3)
    clouds[0::2], clouds[1::2] = middle, torch.stack(many)
    return clouds


def imagine(
    parts: PartSet,
    opinion: Opinion,
    templates: list[Template],
    *,
    steps: int = 20,
    seed: int = 0,
    keep: int = 4,
    on_stage: Callable[[str, float], None] | None = None,
) -> list[Template]:
    """Templates of the parts, best first, at most `keep`: surfaces in units, the scale to the model's lengths, and the centre.

    Args:
        templates: samples of the model, as this returns them; in each round the better half goes on.
        steps: of DPM-Solver++ that samples took.
    """
    tell = on_stage or (lambda name, share: None)
    rounds = ROUNDS if opinion.model.parts is None else ROUNDS[-1:]
    total = len(templates) + sum(min(len(templates), max(keep, len(templates) >> r + 1)) for r in range(len(rounds)))
    done = 0
    search: Search | None = None

    def idea(template: Surface, scale: float, number: int) -> _Idea:
        nonlocal done, search
        tell("imagine", done / total)
        done += 1
        seeded = mix(seed, number)
        search = Search(parts, template, QUICK, seed=seeded, axis=opinion.axis) if search is None else search.on(template, seeded)
        poses = both(parts, search.run(TRIED)[0])
        scores = opinion.scores(search, poses, search.energy(poses))["score"]
        least = int(scores.argmin())
        return _Idea(template, scale, poses[least], float(scores[least]))

    ideas = [idea(template, scale, k) for k, (template, scale, _) in enumerate(templates)]
    if hasattr(opinion.model.denoiser, "draw"):  # it knows a shape by a latent, so it cannot be asked what it makes of another
        return [(idea.template, idea.scale, torch.zeros(3)) for idea in _best(ideas, keep)]
    for r, h in enumerate(rounds):
        ideas = _best(ideas, max(keep, len(ideas) // 2))
        ideas = [idea(*_renewed(opinion, one.pose, h, steps, mix(seed, r)), len(templates) + k) for k, one in enumerate(ideas)]
    found = [_renewed(opinion, one.pose, FINAL, steps, mix(seed, len(rounds)), 2 * POINTS) for one in _best(ideas, keep)]
    return [(template, scale, torch.zeros(3)) for template, scale in found]


def both(parts: PartSet, poses: Tensor) -> Tensor:
    """Assemblies (H, P, 4, 4) as they are, and with what nearly touches brought into contact, where that changes them."""
    moved = [pulled(parts, pose) for pose in poses]
    return torch.stack([*poses, *(new for new, old in zip(moved, poses, strict=True) if not torch.equal(new, old))])


def _whole(steps: int) -> int:
    """Steps of a whole denoising, of which a renewal takes the last: half as many again as a sample takes."""
    return 3 * steps // 2


def _renewed(opinion: Opinion, pose: Tensor, h: float, steps: int, seed: int, points: int = POINTS) -> tuple[Surface, float]:
    """What the model makes of an assembly (P, 4, 4), in units, centred, and its scale."""
    cloud, scale = opinion.cloud(pose, points, seed)
    made = opinion.model.renewed(cloud[None], h, opinion.category, steps=_whole(steps), seed=seed)[0]
    return template_surface(made, scale=scale), scale


def _best(ideas: list[_Idea], count: int) -> list[_Idea]:
    return sorted(ideas, key=lambda idea: idea.total)[:count]
