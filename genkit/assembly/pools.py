"""The candidates of a shape of parts on a template, and what each has on the template's coarse points."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.assembly.candidates import Anchors, residual
from genkit.assembly.density import DensityGrid
from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.rigid import invert, transform
from genkit.assembly.search_config import SearchConfig
from genkit.assembly.surfaces import Shape
from genkit.assembly.symmetry import mirror_axes


class Kind:
    """A shape of parts, and what is asked of it on any template."""

    def __init__(self, shape: Shape, config: SearchConfig) -> None:
        samples = shape.surface
        self.shape = shape
        self.grid = NearestGrid(samples, config.tau, config.resolution * 3 // 4)
        self.rho = DensityGrid(samples.points, torch.full((len(samples),), shape.area / len(samples)), config.width)
        self.anchors = Anchors(samples.points, shape.symmetry)
        half = len(samples) // 2
        own = mirror_axes(samples.points[:half], samples.points[half:]).nonzero().flatten().tolist()
        self.own = own[0] if own else None  # an axis along which the part is its own mirror image


class Pool:
    """The candidates of one shape, and what each has on the template's coarse points; those that are added come first."""

    def __init__(self, kind: Kind, template: NearestGrid, points: Surface) -> None:
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
