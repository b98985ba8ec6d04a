"""PartAssemblyPipeline: the poses of an object's parts, from a reference or from a point-cloud diffusion model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.assembly import point_transformer, pointwise  # noqa: F401  (diffusers finds saved classes among loaded modules)
from genkit.assembly.couplings import Coupling, Target, TemplateTarget
from genkit.assembly.hypotheses import Assemblies, Verdict, judge, verdict
from genkit.assembly.imagined import Opinion, Template, both, imagine, samples
from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import PartSet, content_order
from genkit.assembly.point_model import PointModel
from genkit.assembly.push import PushApartConfig
from genkit.assembly.refinement import annealed, refine
from genkit.assembly.rigid import transform
from genkit.assembly.scale import area_scale, scale_of
from genkit.assembly.search import Search
from genkit.assembly.search_config import SearchConfig
from genkit.assembly.starts import scattered
from genkit.assembly.surfaces import template_surface
from genkit.noise import mix

Start = Literal["search", "random", "given"]
IMAGINED = 0.6  # share of the work, where a model imagines the templates


@dataclasses.dataclass
class PartAssemblyOutput(BaseOutput):
    """What `PartAssemblyPipeline` returns, H distinct assemblies of P parts, best first.

    Args:
        poses: (H, P, 4, 4), float64, from the parts' frames to the assembly, in units (see `genkit.assembly.PartSet`).
        motions: (H, P, 4, 4), float64, of the parts as they came, in the lengths of the input.
        points: the parts' samples in place (H, P, N, 3), in units.
        scale: (H,), how many times larger than the parts the template was.
        scores: `score`, by which they are ranked, `energy`, `coverage`, `fit`, `pieces` (H,) and `residual` (H, P). With a model
            also the terms of `score`, see `genkit.assembly.imagined`, and `agreement` (H,), by which they are ranked then: what
            share of the parts lies as in the likely assemblies. None of them knows the truth.
        template_ids: (H,), which template each was found on.
        equivalence: of each part, the number of the first part of its shape.
        verdict: how sure one can be of the first.
        history: the first assembly while it was refined (P, 4, 4), if that was asked for.
    """

    poses: Any
    motions: Any
    points: Any
    scale: Any
    scores: dict[str, Any]
    template_ids: Any
    equivalence: list[int]
    verdict: Verdict
    history: list[Tensor] | None = None


class PartAssemblyPipeline(DiffusionPipeline):
    """Assembles parts that come in any pose, by searching the poses that make a template, without training for it.

    A template is a reference of the whole (a scan, a mesh), or what the diffusion model imagines of the parts: samples of the
    category, renewed after what was assembled on them (`genkit.assembly.imagined`). Candidate poses are searched on it, the choice
    is settled, and what was found is ranked without the truth. `coupling="index"` denoises the assembled cloud itself instead
    (Zhang et al. 2025, arXiv 2505.00426); see `preset`.

    Args:
        denoiser: of point clouds, see `genkit.assembly.point_model.PointModel`; not needed with a reference.
        scheduler: of the DDPM family.

    Example:
        >>> pipe = PartAssemblyPipeline()
        >>> out = pipe(read_parts("parts"), reference=read_reference("scan.ply"))
        >>> out.motions[0], out.verdict.text
    """

    _optional_components = ["denoiser", "scheduler"]  # noqa: RUF012  (diffusers' own name and kind)

    def __init__(self, denoiser: ModelMixin | None = None, scheduler: SchedulerMixin | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        parts: PartSet | Sequence[Any],
        *,
        category: str | int | None = None,
        reference: Any = None,
        num_templates: int | None = None,
        num_hypotheses: int = 16,
        template_steps: int = 20,
        refine_steps: int | None = None,
        h_range: tuple[float, float] = (0.5, 0.01),
        init: Start = "search",
        initial_poses: Tensor | None = None,
        coupling: Coupling = "ot",
        push_apart: PushApartConfig | None = None,
        estimate_scale: bool = True,
        points_per_part: int = 128,
        chunk_size: int | None = None,
        search: SearchConfig | None = None,
        preset: Literal["paper"] | None = None,
        seed: int = 0,
        on_stage: Callable[[str, float], None] | None = None,
        output_type: Literal["pt", "np"] = "pt",
        return_history: bool = False,
        return_dict: bool = True,
    ) -> PartAssemblyOutput | tuple[Any, ...]:
        """Assemble parts.

        Args:
            parts: of one object, or its meshes or clouds (N, 3), in any pose.
            category: that the model shall draw; without a reference.
            reference: the whole: a mesh, a cloud (K, 3) or a `Surface`, in the lengths of the parts or, with `estimate_scale`, in
                others. Assemblies are in its frame.
            num_templates: clouds that the model draws; by default 4 of one that is told the parts, else 16. A search goes on with
                what becomes of the best quarter of them, or of two.
            num_hypotheses: assemblies that are returned, at most.
            template_steps: of DPM-Solver++ for each cloud; more bring it closer to the parts, and take as much longer.
            refine_steps: of refinement after the start; by default none after a search, which settles by itself, else 60.
            h_range: noise over signal at the first and the last step, in units; in standard deviations with `coupling="index"`.
            init: `search` from nowhere, `random` poses, or `given` ones, which are settled as found ones are.
            initial_poses: (P, 4, 4) or (H, P, 4, 4) in units, for `given`; by default as the parts came.
            coupling: where refinement moves points to, see `genkit.assembly.couplings`; `index` needs the model.
            push_apart: parts that lie in each other are pushed apart during refinement.
            estimate_scale: let the template have another scale than the parts, by their areas.
            points_per_part: in refinement.
            chunk_size: assemblies that are refined at a time; the result does not depend on it.
            search: how to search.
            preset: `paper`, the published loop without its selections by the truth: random poses, 1,000 steps at a fixed small
                noise level, ICP, the published push; `coupling="index"` with a model, `soft` with a reference.
            seed: of templates, random poses, noise and orders.
            on_stage: called with the name of a stage that begins and the share of the work that is done.
            output_type: tensors or arrays.

        Raises:
            ValueError: neither a reference nor a model, both, or arguments that do not go together; a category that the model
                lacks.
            FloatingPointError: a target that is not finite.
        """
        if not isinstance(parts, PartSet):
            clouds = not hasattr(parts[0], "faces") if len(parts) else True
            parts = (PartSet.from_clouds if clouds else PartSet.from_meshes)(parts)
        fit: Literal["kabsch", "icp"] = "kabsch"
        if preset == "paper":
            init, refine_steps, h_range, points_per_part = "random", 1000, (0.02, 0.02), 1000
            coupling, fit = ("index" if reference is None else "soft"), "icp"
            push_apart = PushApartConfig(legacy=True)
        elif preset is not None:
            raise ValueError(f"Unknown preset {preset!r}. Known: paper.")
        self._check(init, coupling, reference, num_templates, num_hypotheses, template_steps)
        order = content_order(parts)
        parts = parts[order]
        if initial_poses is not None:
            initial_poses = initial_poses[..., order, :, :]
        tell = on_stage or (lambda name, share: None)
        tell("template", 0.0)
        opinion, begun = None, 0.0
        if reference is not None:
            templates = self._reference(parts, reference, estimate_scale)
        else:
            opinion, templates = self._drawn(parts, category, init, num_templates, num_hypotheses, template_steps, seed, tell)
            begun = IMAGINED if init == "search" else 0.0
        steps = (0 if init == "search" else 60) if refine_steps is None else refine_steps
        how = _How(
            init=init, initial_poses=initial_poses, coupling=coupling, category=category, push=push_apart, fit=fit, seed=seed,
            levels=annealed(h_range, steps) if steps else [], points=points_per_part, chunk=chunk_size,
        )  # fmt: skip
        axis = None if opinion is None else opinion.axis
        searcher: Search | None = None
        found: list[Assemblies] = []
        for k, template in enumerate(templates):

            def stage(name: str, done: float, k: int = k) -> None:
                tell(name, begun + (1 - begun) * (k + done) / len(templates))

            of, seeded = template[0], mix(seed, k)
            searcher = searcher.on(of, seeded, stage) if searcher else Search(parts, of, search, seeded, stage, axis=axis)
            rows = range(k, num_hypotheses, len(templates))
            found.append(self._assembled(parts, template, k, searcher, how, rows, opinion))
        assert searcher is not None  # there is a template at least
        tell("rank", 1.0)
        best = Assemblies.ranked(found, searcher, parts, num_hypotheses, opinion)
        out = _output(parts, best, searcher, order, history=return_history)
        if output_type == "np":
            for name in ("poses", "motions", "points", "scale", "template_ids"):
                out[name] = out[name].numpy()
            out["scores"] = {key: value.numpy() for key, value in out.scores.items()}
        return out if return_dict else out.to_tuple()

    def _assembled(
        self, parts: PartSet, template: Template, number: int, searcher: Search, how: _How, rows: range, opinion: Opinion | None
    ) -> Assemblies:
        """What is found on a template, as the hypotheses number `rows` (more, if there are more)."""
        surface, scale, centre = template
        if how.init == "search":
            poses = searcher.run(max(len(rows), 1))[0]
            poses = poses if opinion is None else both(parts, poses)
        elif how.init == "given":
            given = parts.frames if how.initial_poses is None else how.initial_poses
            poses = (given if given.ndim == 4 else given[None]).double()
        else:
            poses = torch.stack([scattered(parts, surface, mix(how.seed, h)) for h in rows])
        history = [*(step.expand_as(poses) for step in searcher.trace), poses]
        if how.levels:
            searcher.tell("refine", 0.5)
            seeds = [mix(how.seed, rows.start + i * rows.step) for i in range(len(poses))]

            def target(chosen: slice) -> Target:
                if how.coupling == "index":
                    return self._model().target(how.category, scale, centre, seeds[chosen])
                return TemplateTarget(_thinned(surface), how.coupling)

            poses = _refined(parts, poses, target, how, history)
        if how.init == "given" and how.coupling != "index":
            poses = searcher.settled(poses)
        scores, count = judge(searcher, parts, poses, opinion), len(poses)
        steps = [list(one) for one in zip(*history, strict=True)]
        return Assemblies(poses, scores, torch.full((count,), scale), torch.full((count,), number), steps).distinct(searcher)

    @classmethod
    def from_zoo(cls, model: str) -> PartAssemblyPipeline:
        """Load an embedded model by name, or a folder.

        Raises:
            ValueError: no such model, one of something else, or a folder that is damaged or holds pickles.
        """
        from genkit import zoo
        from genkit.checkpoints import check_folder
        from genkit.errors import unknown

        folder = zoo.folder(model)
        if not folder.is_dir():
            raise unknown("model", model, zoo.names())
        check_folder(folder)
        pipe = cls.from_pretrained(str(folder), use_safetensors=True)
        if pipe.denoiser is None:
            raise ValueError(f"{model!r} is no model of point clouds. Use 'furniture', or a folder that it was trained into.")
        return pipe

    def check_category(self, category: str | int | None) -> None:
        """Refuse a category that the model lacks, before anything is drawn or written.

        Raises:
            ValueError: no such category, or no model.
        """
        self._model().label(category)

    def generate_templates(
        self, count: int, category: str | int | None, *, parts: PartSet | None = None, steps: int = 20, seed: int = 0
    ) -> Tensor:
        """Clouds (count, 2048, 3) of the model, in its lengths; cloud i is a function of (seed, i).

        Args:
            parts: that they shall be made of, if the model takes them.
        """
        return samples(self._model(parts), count, category, steps=steps, seed=seed)

    def _model(self, parts: PartSet | None = None, *, tell: bool = True) -> PointModel:
        if self.denoiser is None or self.scheduler is None:
            raise ValueError("There is no model here. Give a reference (a scan or a mesh), or a pipeline with a denoiser.")
        return PointModel(self.denoiser, self.scheduler, parts, tell=tell)

    def _check(
        self, init: str, coupling: str, reference: Any, num_templates: int | None, num_hypotheses: int, template_steps: int
    ) -> None:
        if init not in ("search", "random", "given"):
            raise ValueError(f"Unknown init {init!r}. Known: search, random, given.")
        counts = {"num_templates": num_templates, "num_hypotheses": num_hypotheses, "template_steps": template_steps}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        if reference is None or coupling == "index":
            self._model()
        if reference is not None and coupling == "index":
            raise ValueError("coupling='index' denoises by the model, so a reference is of no use to it. Leave one of them out.")

    def _reference(self, parts: PartSet, reference: Any, estimate: bool) -> list[Template]:
        """The reference in units of the parts, the scale from units to its lengths, and the centre."""
        template = template_surface(reference, parts.unit)
        scale = scale_of(parts, template) if estimate else 1.0
        if scale != 1.0:
            template = template_surface(reference, parts.unit, scale)
        return [(template, scale, template.points.mean(0))]

    def _drawn(
        self, parts: PartSet, category: str | int | None, init: Start, count: int | None, hypotheses: int, steps: int, seed: int,
        tell: Callable[[str, float], None],
    ) -> tuple[Opinion, list[Template]]:  # fmt: skip
        """What the model thinks of the parts, and the templates that it draws; for a search, what becomes of the best of them."""
        model = self._model(parts, tell=init != "random")
        if count is None:
            count = 16 if model.parts is None else 4
        drawn = samples(model, count, category, steps=steps, seed=seed)
        templates = [_in_units(parts, cloud, model.scale) for cloud in drawn]
        opinion = Opinion(parts, model, category, [template for template, _, _ in templates], float(drawn.square().mean().sqrt()))
        if init == "random":
            templates = templates[:hypotheses]
        if init == "search":
            keep = max(2, count // 4)
            templates = imagine(
                parts, opinion, templates, steps=steps, seed=seed, keep=keep,
                on_stage=lambda name, done: tell(name, IMAGINED * done),
            )  # fmt: skip
        return opinion, templates


def _in_units(parts: PartSet, cloud: Tensor, scale: float | None) -> Template:
    """A cloud of the model in units, its scale, by default such that its surface is as large as the parts', and its centre."""
    scale = area_scale(parts, Surface(cloud)) if scale is None else scale
    return template_surface(cloud, scale=scale), scale, torch.zeros(3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _How:
    """How poses are found on a template; see the arguments of the pipeline's call."""

    init: Start
    initial_poses: Tensor | None
    coupling: Coupling
    category: str | int | None
    push: PushApartConfig | None
    fit: Literal["kabsch", "icp"]
    seed: int
    levels: list[float]
    points: int
    chunk: int | None


def _refined(parts: PartSet, poses: Tensor, target: Callable[[slice], Target], how: _How, history: list[Tensor]) -> Tensor:
    """Poses after refinement, some at a time, each with targets of its own; forty steps at most go into the history."""
    x, poses, size = parts.points[:, : how.points], poses.float(), how.chunk or len(poses)
    moved, steps = [], []
    for first in range(0, len(poses), size):
        rows = slice(first, first + size)
        seen: list[Tensor] = []

        def keep(step: int, now: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(now)

        moved.append(refine(x, poses[rows], target(rows), how.levels, push=how.push, fit=how.fit, on_step=keep))
        steps.append(seen[:: max(1, len(how.levels) // 40)])
    history += [torch.cat(step) for step in zip(*steps, strict=True)]
    return torch.cat(moved).double()


def _thinned(template: Surface, count: int = 1024) -> Tensor:
    """Some of the template's points (K, 3)."""
    generator = torch.Generator().manual_seed(mix(len(template), 3))
    return template.points[torch.randperm(len(template), generator=generator)[:count]]


def _output(parts: PartSet, best: Assemblies, searcher: Search, order: list[int], *, history: bool) -> PartAssemblyOutput:
    """The best assemblies, the parts in the order that they came in."""
    scores = {**best.scores, "residual": _unsorted(best.scores["residual"], order, 1)}
    motions, points = parts.to_input(best.poses), transform(parts.points.double(), best.poses)
    return PartAssemblyOutput(
        poses=_unsorted(best.poses, order, 1), motions=_unsorted(motions, order, 1), points=_unsorted(points, order, 1),
        scale=best.scale, scores=scores, template_ids=best.templates, equivalence=_equivalence(searcher, order),
        verdict=verdict(scores), history=[_unsorted(step, order, 0) for step in best.history[0]] if history else None,
    )  # fmt: skip


def _equivalence(searcher: Search, order: list[int]) -> list[int]:
    """Of each part, in the order that they came in, the number of the first part of its shape."""
    first = [0] * len(order)
    for shape in searcher.shapes:
        members = sorted(order[searcher.order[i]] for i in shape.members)
        for i in members:
            first[i] = members[0]
    return first


def _unsorted(values: Tensor, order: list[int], axis: int) -> Tensor:
    """Values of sorted parts, in the order that the parts came in."""
    return values.index_select(axis, torch.tensor(order).argsort())
