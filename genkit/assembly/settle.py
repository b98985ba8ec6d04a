"""Settles whole assemblies on a template: ICP in both directions, where each template point is explained by one part only.

    E(g) = mean_m min_p min(|s_m - Y_p|^2, tau^2) + lambda sum_p a_p mean_n min(|y_pn - S|^2, tau^2)
           + mu mean_m (rho(s_m) - sum_p rho_p(s_m))^2,                                                     Y_p = g_p X_p

the energy of `genkit.assembly.selection`, of any poses. A step freezes the matches of the first two terms (the second one's are
ICP's; the first one's give a template point to its nearest part) and solves for all poses at once by Kabsch. A part that lies
anywhere inside a plane is drawn to the stretch of it that nobody else covers, which is why the second term's matches, that hold
it, weigh little.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.assembly.density import DensityGrid
from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.rigid import invert, kabsch, pose_matrix, transform

HOLD = 0.1  # weight of the second term's matches over that of the energy


class Settler:
    """The energy of assemblies of some parts on a template, and its local minimum.

    Args:
        x, normals: samples of the parts (P, n, 3), in their frames, for the second term.
        shares: of the surface (P,), their sum 1.
        template: samples of it (M of them), which the first and third term average over.
        target: density of the template there (M,).
        grid: of the template.
        part_grids, part_densities: of each part.
        residual_weight, density_weight: lambda and mu.
    """

    def __init__(
        self, x: Tensor, normals: Tensor, shares: Tensor, template: Surface, target: Tensor, grid: NearestGrid, part_grids:
        list[NearestGrid],
        part_densities: list[DensityGrid], *, residual_weight: float = 1.0, density_weight: float = 1e-3,
    ) -> None:  # fmt: skip
        self.x, self.normals, self.shares, self.target, self.grid = x, normals, shares, target, grid
        self.template, self.template_normals = template.points, template.normals
        self.part_grids, self.part_densities = part_grids, part_densities
        self.residual_weight, self.density_weight = residual_weight, density_weight

    def covers(self, poses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of assemblies (..., P, 4, 4) at the template's points: nearest places of the parts, in their frames (..., P, M, 3),
        squared distances and densities (..., P, M)."""
        local = transform(self.template, invert(poses))
        parts, turned = local.unbind(-3), (self.template_normals @ poses[..., :3, :3]).unbind(-3)
        near = torch.stack([grid.nearest(y, n) for grid, y, n in zip(self.part_grids, parts, turned, strict=True)], -3)
        density = torch.stack([rho(y) for rho, y in zip(self.part_densities, parts, strict=True)], -2)
        return near, (local - near).square().sum(-1).clamp(max=self.grid.tau**2), density

    def energy(self, poses: Tensor) -> Tensor:
        """E (...) of assemblies (..., P, 4, 4)."""
        _, squared, density = self.covers(poses)
        return self._energy(poses, squared, density)

    def _energy(self, poses: Tensor, squared: Tensor, density: Tensor) -> Tensor:
        residual = (self.grid.squared(transform(self.x, poses), self.normals @ poses[..., :3, :3].mT).mean(-1) * self.shares).sum(
            -1
        )
        crowd = (self.target - density.sum(-2)).square().mean(-1)
        return squared.amin(-2).mean(-1) + self.residual_weight * residual + self.density_weight * crowd

    def settle(self, poses: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The best of the poses met in some steps, (..., P, 4, 4), and its energy (...)."""
        best, least = poses, None
        for step in range(steps + 1):
            near, squared, density = self.covers(poses)
            energy = self._energy(poses, squared, density)
            if least is None:
                least = energy
            better = energy < least
            best, least = torch.where(better[..., None, None, None], poses, best), torch.where(better, energy, least)
            if step < steps:
                poses = self._step(poses, near, squared)
        assert least is not None
        return best, least

    def _step(self, poses: Tensor, near: Tensor, squared: Tensor) -> Tensor:
        limit = self.grid.tau**2
        least, owner = squared.min(-2)
        owns = (owner[..., None, :] == torch.arange(len(self.x), device=poses.device)[:, None]) & (least < limit)[..., None, :]
        y = transform(self.x, poses)
        target = self.grid.nearest(y, self.normals @ poses[..., :3, :3].mT)
        lies = (y - target).square().sum(-1) < limit
        a = owns.to(y) / len(self.template)
        b = lies * (HOLD * self.residual_weight * self.shares[:, None] / self.x.shape[1])
        return _solve(self.x.expand_as(y), y, torch.where(lies[..., None], target, y), b, near, self.template, owns, a)

    def replace(
        self, poses: Tensor, p: int, candidates: Tensor, *, away: int | None = None, shortlist: int = 24, steps: int = 4
    ) -> Tensor:
        """The assembly (P, 4, 4) with part p put where the energy is least: the best of some candidates (K, 4, 4), each settled.

        Candidates lie on a grid, so where a part belongs may look worse than where it does not; settling them before they are
        compared mends that.

        Args:
            away: a part that is taken out meanwhile; p then leaves its place for one of the candidates.
        """
        _, squared, density = self.covers(poses)
        others = [q for q in range(len(poses)) if q not in (p, away)]
        limit = squared.new_full(squared[:1].shape, self.grid.tau**2)
        base = torch.cat([squared[others], limit]).amin(0), density[others].sum(0)
        tried = candidates if away is not None else torch.cat([poses[p : p + 1], candidates])
        energy = self._alone(tried, p, *base, every=4)[0]
        if away is None:
            energy[0] = -torch.inf  # where it is now is compared too
        tried = tried[energy.topk(min(shortlist + 1, len(tried)), largest=False).indices]
        found, least = tried, None
        for step in range(steps + 1):
            energy, matches = self._alone(tried, p, *base)
            if least is None:
                least = energy
            better = energy < least
            found, least = torch.where(better[:, None, None], tried, found), torch.where(better, energy, least)
            if step < steps:
                tried = _solve(*matches)
        assert least is not None
        moved = poses.clone()
        moved[p] = found[int(least.argmin())]
        return moved

    def _alone(
        self, tried: Tensor, p: int, base_cover: Tensor, base_density: Tensor, every: int = 1
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Energy (K,) of part p in poses (K, 4, 4) while the others have a cover and a density (M,), and the matches of a step."""
        x, limit = self.x[p], self.grid.tau**2
        template, normals, target = self.template[::every], self.template_normals[::every], self.target[::every]
        base_cover, base_density = base_cover[::every], base_density[::every]
        local = transform(template, invert(tried))
        near = self.part_grids[p].nearest(local, normals @ tried[:, :3, :3])
        squared = (local - near).square().sum(-1)
        y = transform(x, tried)
        on = self.grid.nearest(y, self.normals[p] @ tried[:, :3, :3].mT)
        apart = (y - on).square().sum(-1)
        residual = self.residual_weight * self.shares[p] * apart.clamp(max=limit).mean(-1)
        crowd = (target - base_density - self.part_densities[p](local)).square().mean(-1)
        energy = squared.minimum(base_cover).mean(-1) + residual + self.density_weight * crowd
        lies, owns = apart < limit, squared < base_cover
        a, b = owns.to(y) / len(template), lies * (HOLD * self.residual_weight * self.shares[p] / len(x))
        return energy, (x.expand_as(y), y, torch.where(lies[..., None], on, y), b, near, template, owns, a)


def _solve(x: Tensor, y: Tensor, target: Tensor, b: Tensor, near: Tensor, template: Tensor, owns: Tensor, a: Tensor) -> Tensor:
    """Poses from the matches of part points x with `target` (weights b), and of places `near` on the part with template points (a).

    A part without any match stays where it is: its points y are their own targets, with a weight that counts only then.
    """
    src = torch.cat([x, torch.where(owns[..., None], near, 0.0)], -2)
    dst = torch.cat([target, template.expand_as(near)], -2)
    rotation, translation, _ = kabsch(src, dst, torch.cat([b + 1e-9, a], -1))
    return pose_matrix(rotation, translation)
