"""Search and select: finds the poses of parts that make a template, from nowhere.

1. Candidates of each shape, from everywhere (`candidates`).
2. One candidate of each part so that together they make the template (`selection`): many orders, then pairs. Where the whole is its
   own mirror image, also of each part together with its image (`pairs`).
3. The best choices are settled (`settle`), each part is put anew where the energy is least while the others stay, and parts that
   could be taken for each other change places.
4. What was found joins the candidates, and steps 2 and 3 are repeated.

Nothing depends on the pose that a part came in, or on the order of the parts: they are put in the order of their content first.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.assembly.candidates import propose, residual
from genkit.assembly.density import DensityGrid
from genkit.assembly.mirror import Mirror, asymmetry, split
from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.pairs import Measured, PairChoice
from genkit.assembly.parts import PartSet, content_order
from genkit.assembly.pools import Kind, Pool
from genkit.assembly.rigid import pose_matrix
from genkit.assembly.search_config import SearchConfig
from genkit.assembly.selection import Costs, choose, improve_pairs, rank
from genkit.assembly.settle import Settler
from genkit.assembly.surfaces import part_surface, shapes_of
from genkit.assembly.symmetry import box_rotations
from genkit.noise import mix

_APART = 0.01  # candidates that are nearer are one
_ALIKE = 0.2  # boxes that differ less may be taken for each other


class Search:
    """The search of one object on one template.

    Args:
        parts: of the object.
        template: samples of the template, in units of the parts.
        seed: of the orders that are tried.
        on_stage: called with the name of a stage that begins and the share of the work that is done.
        axis: across which the whole is its own mirror image (`genkit.assembly.mirror`); None if it is not known to be. Then an
            assembly's asymmetry adds to its energy.

    Example:
        >>> poses, energy = Search(parts, template_surface(scan, parts.unit)).run()      # (H, P, 4, 4) and (H,), best first
    """

    def __init__(
        self, parts: PartSet, template: Surface, config: SearchConfig | None = None, seed: int = 0,
        on_stage: Callable[[str, float], None] | None = None, *, axis: int | None = None,
    ) -> None:  # fmt: skip
        self.axis = axis
        self.order = content_order(parts)
        self.parts, self.config = parts[self.order], config or SearchConfig()
        self.shapes = shapes_of(self.parts, [part_surface(self.parts, i) for i in range(len(parts))])
        self.shape_of = [0] * len(parts)
        for k, shape in enumerate(self.shapes):
            for i in shape.members:
                self.shape_of[i] = k
        self.rivals = self._rivals()
        self.kinds = [Kind(shape, self.config) for shape in self.shapes]
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
        self.mirror = None if self.axis is None else Mirror.of(template, self.axis)
        self.grid = NearestGrid(template, config.tau, config.resolution)
        rho = DensityGrid(template.points, template.areas * (total / template.areas.sum()), config.width)(template.points)
        mixed = torch.randperm(len(template), generator=torch.Generator().manual_seed(mix(len(template), 2)))
        self.coarse, self.coarse_rho = template[mixed[: config.coarse]], rho[mixed[: config.coarse]]
        self.pools = [Pool(kind, self.grid, self.coarse) for kind in self.kinds]
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
            chosen = [self._select()] if self.mirror is None else [self._select(), self._select_pairs(self.mirror)]
            beam = self._best(torch.cat([beam, *chosen]), config.beam)
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
        best = (energy + self._irregular(poses)).argsort(stable=True)
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
        config, pools, costs = self.config, self.pools, self._costs()
        found = choose(costs, config.starts, self.generator)[: config.beam]
        better = rank(costs, [improve_pairs(costs, choice) for _, choice in found])
        chosen = [torch.stack([pools[k].poses[c] for k, c in zip(self.shape_of, choice, strict=True)]) for _, choice in better]
        return self.quick.settle(torch.stack(chosen), 6)[0]

    def _costs(self) -> Costs:
        pools = self.pools
        return Costs(
            [p.cover for p in pools], [p.density for p in pools], [p.residual for p in pools], self.shape_of, self.shares,
            self.coarse_rho, self.config.tau**2, density_weight=self.config.density_weight,
        )  # fmt: skip

    def _select_pairs(self, mirror: Mirror) -> Tensor:
        """As `_select`, each part together with its image, or across the plane."""
        config, parted = self.config, []
        for kind, pool in zip(self.kinds, self.pools, strict=True):
            if kind.own is None:
                parted.append((pool.poses, pool.poses[:0]))
            else:
                single, one = split(pool.poses, pool.anchors, mirror, kind.own)
                parted.append((self._apart(kind, single), self._apart(kind, one)))
        choice = PairChoice(
            [shape.members for shape in self.shapes], [kind.own for kind in self.kinds], parted, mirror, self._measured
        )
        found = choice.choose(self._costs(), config.patterns, max(2, config.starts // 4), config.beam, self.generator)
        return self.quick.settle(found, 6)[0] if len(found) else found

    def _apart(self, kind: Kind, poses: Tensor) -> Tensor:
        """Those of candidates (K, 4, 4) that differ, best first."""
        if len(poses) == 0:
            return poses
        lies = residual(kind.shape.surface, poses, self.grid)
        return poses[kind.anchors.apart(poses, lies, len(poses), _APART)]

    def _measured(self, k: int, poses: Tensor) -> Measured:
        """What poses (K, 4, 4) of shape k have on the template."""
        pool = Pool(self.kinds[k], self.grid, self.coarse)
        pool.add(poses)
        return pool.cover, pool.density, pool.residual

    def asymmetry(self, poses: Tensor) -> Tensor:
        """How far assemblies (H, P, 4, 4) are from their mirror images (H,), see `genkit.assembly.mirror`; zero without a plane."""
        return self._asymmetry(torch.stack([self.to_shapes(pose) for pose in poses]))

    def _asymmetry(self, poses: Tensor) -> Tensor:
        if self.mirror is None:
            return torch.zeros(len(poses))
        grids = [self.kinds[k].grid for k in self.shape_of]
        return asymmetry(poses, self.quick.x, self.quick.normals, self.shares, grids, self.mirror)

    def _irregular(self, poses: Tensor) -> Tensor:
        """What is added to the energy where there is a plane."""
        return self.config.asymmetry_weight * self._asymmetry(poses)

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
        return assemblies[(self.quick.energy(assemblies) + self._irregular(assemblies)).argsort(stable=True)[:count]]

    def _learn(self, beam: Tensor) -> None:
        """What the beam has joins the candidates: of a shape's own parts, and, for exchanges, of shapes with about the same box."""
        for shape, pool in zip(self.shapes, self.pools, strict=True):
            more = [beam[:, i] for i in shape.members]
            first = shape.members[0]
            for other in self.shapes:
                if other is not shape and (self._box(first) - self._box(other.members[0])).abs().max() < _ALIKE:
                    more += [(beam[:3, i, None] @ self._flips(first)).flatten(0, 1) for i in other.members]
            pool.add(torch.cat(more), radius=_APART)

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
