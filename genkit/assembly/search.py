"""Search and select: finds the poses of parts that make a template, from nowhere.

1. Candidates of each shape, from everywhere (`candidates`).
2. One candidate of each part so that together they make the template (`selection`): many orders, then pairs.
3. The best choices are settled (`settle`), each part is put anew where the energy is least while the others stay, and parts that
could
   be taken for each other change places.
4. What was found joins the candidates, and steps 2 and 3 are repeated.

Nothing depends on the pose that a part came in, or on the order of the parts: they are put in the order of their content first.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.assembly.candidates import Anchors, propose, residual
from genkit.assembly.density import DensityGrid
from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import invert, pose_matrix, transform
from genkit.assembly.selection import Costs, choose, improve_pairs, rank
from genkit.assembly.settle import Settler
from genkit.assembly.surfaces import Shape, part_surface, shapes_of
from genkit.assembly.symmetry import box_rotations
from genkit.assembly.units import ratio_near
from genkit.noise import mix

_ALIKE = 0.2  # boxes that differ less may be taken for each other
_SAME_SCALE = (0.6, 1.6)  # a scan may lack hidden faces, and its area is an estimate; other units differ by more


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. Lengths are in units of the longest side of a part.

    Args:
        candidates: of each shape, with rotations of the cube; there are as many with others.
        rotations: size of the even grid on SO(3).
        voxel: of the volume of translations.
        radius: between two candidates.
        starts: orders of the parts that a choice begins with.
        beam: assemblies that go on.
        rounds: of choosing, settling and putting anew.
        renewed: of the beam, how many have their parts put anew.
        exchanges: pairs of parts that are tried in each other's place, in each round.
        tau: distances are cut off here.
        width: of the density of surface.
        density_weight: of the energy's third term.
        coarse, fine: points of the template that choices and that settled assemblies are compared on.
        resolution: voxels of the template's table along its longest side; a part's has three quarters.

    Raises:
        ValueError: a value that is not positive.
    """

    candidates: int = 256
    rotations: int = 384
    voxel: float = 0.04
    radius: float = 0.05
    starts: int = 24
    beam: int = 8
    rounds: int = 2
    renewed: int = 2
    exchanges: int = 8
    tau: float = 0.1
    width: float = 0.03
    density_weight: float = 1e-3
    coarse: int = 768
    fine: int = 1024
    last: int = 4096
    resolution: int = 96

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be positive.")


class _Kind:
    """A shape of parts, and what is asked of it on any template."""

    def __init__(self, shape: Shape, config: SearchConfig) -> None:
        samples = shape.surface
        self.shape = shape
        self.grid = NearestGrid(samples, config.tau, config.resolution * 3 // 4)
        self.rho = DensityGrid(samples.points, torch.full((len(samples),), shape.area / len(samples)), config.width)
        self.anchors = Anchors(samples.points, shape.symmetry)


class _Pool:
    """The candidates of one shape, and what each has on the template's coarse points; those that are added come first."""

    def __init__(self, kind: _Kind, template: NearestGrid, points: Surface) -> None:
        self.shape, self.template, self.coarse = kind.shape, template, points
        self.grid, self.rho, self.anchors = kind.grid, kind.rho, kind.anchors
        self.poses = torch.empty(0, 4, 4)
        self.cover, self.density = torch.empty(0, len(points)), torch.empty(0, len(points))
        self.residual = torch.empty(0)

    def add(self, poses: Tensor, radius: float | None = None) -> None:
        """More candidates (K, 4, 4); with a radius, only those that are so far apart from each other."""
        lies = residual(self.shape.surface, poses, self.template)
        if radius is not None:
            kept = self.anchors.apart(poses, lies, len(poses), radius)
            poses, lies = poses[kept], lies[kept]
        local = transform(self.coarse.points, invert(poses))
        cover = self.grid.squared(local, self.coarse.normals @ poses[:, :3, :3])
        self.poses, self.residual = torch.cat([poses, self.poses]), torch.cat([lies, self.residual])
        self.cover, self.density = torch.cat([cover, self.cover]), torch.cat([self.rho(local), self.density])


class Search:
    """The search of one object on one template.

    Args:
        parts: of the object.
        template: samples of the template, in units of the parts.
        seed: of the orders that are tried.
        on_stage: called with the name of a stage that begins and the share of the work that is done.

    Example:
        >>> poses, energy = Search(parts, template_surface(scan, parts.unit)).run()      # (H, P, 4, 4) and (H,), best first
    """

    def __init__(
        self, parts: PartSet, template: Surface, config: SearchConfig | None = None, seed: int = 0,
        on_stage: Callable[[str, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.order = content_order(parts)
        self.parts, self.config = parts[self.order], config or SearchConfig()
        self.shapes = shapes_of(self.parts, [part_surface(self.parts, i) for i in range(len(parts))])
        self.shape_of = [0] * len(parts)
        for k, shape in enumerate(self.shapes):
            for i in shape.members:
                self.shape_of[i] = k
        self.rivals = self._rivals()
        self.kinds = [_Kind(shape, self.config) for shape in self.shapes]
        self._prepare(template, seed, on_stage)

    def on(self, template: Surface, seed: int = 0, on_stage: Callable[[str, float], None] | None = None) -> Search:
        """The search of the same object on another template."""
        other = copy.copy(self)
        other._prepare(template, seed, on_stage)
        return other

    def _prepare(self, template: Surface, seed: int, on_stage: Callable[[str, float], None] | None) -> None:
        self.tell = on_stage or (lambda name, share: None)
        self.generator = torch.Generator().manual_seed(mix(seed, 1))
        self.trace: list[Tensor] = []  # the best assembly (P, 4, 4) after each stage of `run`
        config, total = self.config, float(self.parts.areas.sum())
        self.template = template
        self.grid = NearestGrid(template, config.tau, config.resolution)
        rho = DensityGrid(template.points, template.areas * (total / template.areas.sum()), config.width)(template.points)
        mixed = torch.randperm(len(template), generator=torch.Generator().manual_seed(mix(len(template), 2)))
        self.coarse, self.coarse_rho = template[mixed[: config.coarse]], rho[mixed[: config.coarse]]
        self.pools = [_Pool(kind, self.grid, self.coarse) for kind in self.kinds]
        self.shares = self.parts.areas / total
        few = [self.shapes[k].surface[torch.arange(128)] for k in self.shape_of]
        x, normals = torch.stack([s.points for s in few]), torch.stack([s.normals for s in few])

        def settler(count: int) -> Settler:
            rows = mixed[:count]
            return Settler(
                x, normals, self.shares, template[rows], rho[rows], self.grid, [self.kinds[k].grid for k in self.shape_of],
                [self.kinds[k].rho for k in self.shape_of], density_weight=config.density_weight,
            )  # fmt: skip

        self.quick, self.exact = settler(config.fine), settler(config.last)

    def run(self, keep: int = 16) -> tuple[Tensor, Tensor]:
        """Poses (H, P, 4, 4) of the parts in units, best first, at most `keep`, and their energies (H,)."""
        config = self.config
        self._propose()
        beam = torch.empty(0, len(self.parts), 4, 4)
        for turn in range(config.rounds):
            share = 0.4 + 0.55 * turn / config.rounds
            self.tell("select", share)
            beam = self._best(torch.cat([beam, self._select()]), config.beam)
            self.tell("settle", share + 0.25 / config.rounds)
            beam = self._best(torch.cat([beam, self._renew(beam[: config.renewed])]), 4 * config.beam)
            self.trace += self._in_frames(beam[:1])
            if turn < config.rounds - 1:
                self._learn(beam)
        self.tell("finish", 0.95)
        for _ in range(config.rounds):
            better = self._best(torch.cat([beam, self._renew(beam[:1])]), 4 * config.beam)
            if torch.equal(better[0], beam[0]):
                break
            beam = better
            self.trace += self._in_frames(beam[:1])
        poses, energy = self.exact.settle(beam[:keep], 8)
        best = energy.argsort(stable=True)
        self.tell("finish", 1.0)
        return self._in_frames(poses[best]), energy[best]

    def settled(self, poses: Tensor, steps: int = 8) -> Tensor:
        """Assemblies (H, P, 4, 4) that are nearly right, settled on the template."""
        return self._in_frames(self.exact.settle(torch.stack([self.to_shapes(pose) for pose in poses]), steps)[0])

    def energy(self, poses: Tensor) -> Tensor:
        """The energy (H,) of assemblies (H, P, 4, 4)."""
        return self.exact.energy(torch.stack([self.to_shapes(pose) for pose in poses]))

    def _propose(self) -> None:
        config = self.config
        span = float((self.template.points.amax(0) - self.template.points.amin(0)).max())
        voxel = max(config.voxel, span / 96)  # so that the volume stays small whatever the object
        bases = torch.eye(3, dtype=torch.float64)[None]
        for k, (shape, pool) in enumerate(zip(self.shapes, self.pools, strict=True)):
            self.tell("propose", 0.4 * k / len(self.shapes))
            found = propose(
                shape.surface, shape.symmetry, self.grid, bases=bases, rotations=config.rotations, count=config.candidates,
                voxel=voxel, radius=config.radius,
            )  # fmt: skip
            pool.add(found.poses)

    def _select(self) -> Tensor:
        config, pools = self.config, self.pools
        costs = Costs(
            [p.cover for p in pools], [p.density for p in pools], [p.residual for p in pools], self.shape_of, self.shares,
            self.coarse_rho, config.tau**2, density_weight=config.density_weight,
        )  # fmt: skip
        found = choose(costs, config.starts, self.generator)[: config.beam]
        better = rank(costs, [improve_pairs(costs, choice) for _, choice in found])
        chosen = [torch.stack([pools[k].poses[c] for k, c in zip(self.shape_of, choice, strict=True)]) for _, choice in better]
        return self.quick.settle(torch.stack(chosen), 6)[0]

    def _renew(self, assemblies: Tensor) -> Tensor:
        """Each part put anew, in a random order, then settled."""
        found: list[Tensor] = []
        for poses in assemblies:
            for p in torch.randperm(len(self.parts), generator=self.generator).tolist():
                poses = self.quick.replace(poses, p, self._places(poses[p], p))
            poses, energy = self.quick.settle(poses, 4)
            found.append(poses if len(found) else self._exchange(poses, energy))
        return torch.stack(found)

    def _exchange(self, poses: Tensor, energy: Tensor) -> Tensor:
        """Parts of about the same box change places, where that is better; no move of one part alone leads there."""
        for p, q in self.rivals:
            tried = self.quick.replace(poses, p, poses[q] @ self._flips(p), away=q)
            tried = self.quick.replace(tried, q, self._places(poses[p], q))
            tried = self.quick.replace(tried, p, self._places(tried[p], p))
            tried, reached = self.quick.settle(tried, 4)
            if reached < energy:
                poses, energy = tried, reached
        return poses

    def _places(self, pose: Tensor, p: int) -> Tensor:
        """Where part p may go: a pose, its box turned there in all ways, and the candidates."""
        return torch.cat([pose @ self._flips(p), self.pools[self.shape_of[p]].poses])

    def _flips(self, p: int) -> Tensor:
        """Rotations (k, 4, 4) of the box of part p's shape to itself."""
        turns = box_rotations(self._box(p), 0.03).float()
        return pose_matrix(turns, torch.zeros(len(turns), 3))

    def _box(self, p: int) -> Tensor:
        return self.parts.extents[self.shapes[self.shape_of[p]].members[0]].double()

    def _rivals(self) -> list[tuple[int, int]]:
        """Pairs of parts of different shapes and about the same box, the most alike first."""
        pairs = itertools.combinations(range(len(self.parts)), 2)
        apart = {(p, q): float((self._box(p) - self._box(q)).abs().max()) for p, q in pairs if self.shape_of[p] != self.shape_of[q]}
        return sorted((pair for pair in apart if apart[pair] < _ALIKE), key=apart.__getitem__)[: self.config.exchanges]

    def _best(self, assemblies: Tensor, count: int) -> Tensor:
        return assemblies[self.quick.energy(assemblies).argsort(stable=True)[:count]]

    def _learn(self, beam: Tensor) -> None:
        """What the beam has joins the candidates: of a shape's own parts, and, for exchanges, of shapes with about the same box."""
        for shape, pool in zip(self.shapes, self.pools, strict=True):
            more = [beam[:, i] for i in shape.members]
            first = shape.members[0]
            for other in self.shapes:
                if other is not shape and (self._box(first) - self._box(other.members[0])).abs().max() < _ALIKE:
                    more += [(beam[:3, i, None] @ self._flips(first)).flatten(0, 1) for i in other.members]
            pool.add(torch.cat(more), radius=0.01)

    def _in_frames(self, poses: Tensor) -> Tensor:
        """From poses of the shapes to poses of the parts' own frames, in the order of the input."""
        placed = poses.double().clone()
        for shape in self.shapes:
            for i, turn in zip(shape.members, shape.turns, strict=True):
                placed[:, i, :3, :3] = placed[:, i, :3, :3] @ turn
        back = torch.empty_like(placed)
        back[:, self.order] = placed
        return back

    def to_shapes(self, poses: Tensor) -> Tensor:
        """The inverse of `_in_frames`, of poses (P, 4, 4): what the energies take."""
        placed = poses[self.order].float().clone()
        for shape in self.shapes:
            for i, turn in zip(shape.members, shape.turns, strict=True):
                placed[i, :3, :3] = placed[i, :3, :3] @ turn.T.float()
        return placed


def content_order(parts: PartSet) -> list[int]:
    """An order of the parts that does not depend on the order that they came in."""
    keys = [
        (round(-float(a), 6), hashlib.sha256(p.numpy().tobytes()).hexdigest())
        for a, p in zip(parts.areas, parts.points, strict=True)
    ]
    return sorted(range(len(parts)), key=keys.__getitem__)


def scale_of(parts: PartSet, template: Surface) -> float:
    """How many times larger than the parts a template is that may be a scan of them; 1 where it is about as large.

    Where it is measured in other units, most likely, it is their ratio: areas alone tell the scale to some percent only.
    """
    scale = area_scale(parts, template)
    return 1.0 if _SAME_SCALE[0] < scale < _SAME_SCALE[1] else ratio_near(scale)


def area_scale(parts: PartSet, template: Surface) -> float:
    """How many times larger than the parts a template is, by areas.

    The area of a cloud is estimated, and comes out too small where boards are thinner than its points are apart (to a quarter on
    some furniture); so the parts' area is estimated from samples that are as sparse.
    """
    total, shown = float(parts.areas.sum()), 0.0
    for i, area in enumerate(parts.areas.tolist()):
        surface = part_surface(parts, i)
        count = min(len(surface), max(32, round(len(template) * area / total)))
        shown += float(Surface(surface.points[:count], surface.normals[:count]).areas.sum())
    return math.sqrt(float(template.areas.sum()) / shown)
