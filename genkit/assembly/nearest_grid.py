"""Nearest places of a sampled surface by look-up: a voxel grid that knows, of each voxel, the nearest sample of a like normal.

    v = y - s_k,  v_n = (v . n_k) n_k,  v_t = v - v_n            s_k the nearest sample whose normal is within 45 degrees of y's
    d^2(y) = min(|v_n|^2 + max(0, |v_t| - rho_k)^2, tau^2)        tau^2 also outside of the grid

Each sample stands for a disc of the surface, of radius rho about the distance between samples: without it, d would measure how
sparse the samples are (A / (pi N) on average for N of them on an area A), not how far the surface is. Normals (of either sign)
keep the narrow side of a board from resting on the face of another one. A look-up costs no search, runs on any device and takes
any batch, so thousands of poses can be tried.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree
from torch import Tensor

NEIGHBOURS = 10  # that a sample's normal and disc are estimated from
WIDE = 1.5  # radius of a disc over the mean distance of a sample to the place that it is nearest to
FLAT = 0.1  # variance across over variance along; neighbours that are less flat than this show no normal
ALIKE = 0.5**0.5  # cosine of the angle of a sample's normal to the direction of its table


class Surface:
    """Samples of a surface (M, 3), float32, with the normals (M, 3) and the radii (M,) of the discs that they stand for.

    Args:
        normals: where they are known. Otherwise they are estimated from the neighbours; where those show none, the normal is zero
            and the disc a point.

    `areas` (M,) are what the samples stand for, from the distances of their neighbours: the sum is about the whole area.
    """

    def __init__(self, points: Tensor, normals: Tensor | None = None) -> None:
        self.points = points.detach().float()
        count = min(NEIGHBOURS, len(points) - 1)
        cloud = self.points.double().cpu()
        distance, index = (torch.from_numpy(found) for found in KDTree(cloud.numpy()).query(cloud.numpy(), k=count + 1))
        # Of k neighbours within the distance d, each has an area pi d^2 / k to itself.
        self.areas = (torch.pi * distance[:, -1].square() / count).to(self.points)
        self.radii = (WIDE * distance[:, -1] / count**0.5).to(self.points)
        if normals is None:
            spread = cloud[index] - cloud[index].mean(1, keepdim=True)
            values, axes = torch.linalg.eigh(spread.mT @ spread)
            flat = (values[:, 0] < FLAT * values[:, 1]).to(self.points.device)
            normals = axes[..., 0].to(self.points) * flat[:, None]
            self.radii = self.radii * flat
        self.normals = normals.to(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: Tensor) -> Surface:
        """Some of the samples, their discs as they are."""
        part = object.__new__(Surface)
        for name, value in vars(self).items():
            setattr(part, name, value[rows])
        return part


@functools.cache
def _directions() -> Tensor:
    """13 lines (13, 3) through the neighbours of a voxel: no direction is farther than 27 degrees from one of them."""
    found = [v for v in itertools.product((-1, 0, 1), repeat=3) if v > (0, 0, 0)]
    return torch.nn.functional.normalize(torch.tensor(found, dtype=torch.float32), dim=-1)


class NearestGrid:
    """The grid of a surface.

    Args:
        surface: its samples.
        tau: distances are cut off here, and the grid ends so far outside of the surface.
        resolution: voxels along the longest side.

    Example:
        >>> grid = NearestGrid(Surface(template), tau=0.1)
        >>> grid.squared(transform(part, poses)).mean(-1)       # (K,): how well the part lies on the template, for K poses
    """

    def __init__(self, surface: Surface, tau: float, resolution: int = 64) -> None:
        points = surface.points
        self.tau, self._count = tau, len(points)
        self.low = points.amin(0) - tau
        sides = points.amax(0) + tau - self.low
        self.voxel = float(sides.max() / resolution)
        self.size = (sides / self.voxel).ceil().long().clamp_min(1)
        # One table for each direction, of the samples that face that way or have no normal; the last one has all.
        faces = (surface.normals @ _directions().T.to(points)).abs() > ALIKE
        faces |= (surface.normals == 0).all(-1, keepdim=True)
        everyone = torch.ones_like(faces[:, :1])
        self._near = torch.stack([self._table(points, chosen) for chosen in torch.cat([faces, everyone], 1).unbind(1)])
        nowhere = points.new_full((1, 3), 1e6)
        self._points, self._normals = torch.cat([points, nowhere]), torch.cat([surface.normals, torch.zeros_like(nowhere)])
        self._radii = torch.cat([surface.radii, surface.radii.new_zeros(1)])

    def _table(self, points: Tensor, chosen: Tensor) -> Tensor:
        """Of each voxel the sample of the nearest voxel that has one (V,)."""
        rows = chosen.nonzero().flatten()
        table = torch.full((int(self.size.prod()),), -1, device=points.device)
        if len(rows) == 0:
            return torch.full_like(table, self._count)
        # The last of several samples in a voxel: which one an assignment would keep depends on the threads.
        table.scatter_reduce_(0, self._row(((points[rows] - self.low) / self.voxel).floor().long()), rows, "amax")
        sample = table.reshape(self.size.tolist()).cpu().numpy()
        place = distance_transform_edt(sample < 0, return_distances=False, return_indices=True)
        return torch.from_numpy(np.ascontiguousarray(sample[tuple(place)]).ravel()).to(points.device)

    def _row(self, cell: Tensor) -> Tensor:
        cell = cell.clamp_min(0).minimum(self.size - 1)
        return (cell[..., 0] * self.size[1] + cell[..., 1]) * self.size[2] + cell[..., 2]

    def nearest(self, y: Tensor, normals: Tensor | None = None) -> Tensor:
        """The nearest places of the surface (..., 3) to y (..., 3); a place very far away where none is within tau.

        Args:
            normals: of y (..., 3); where they are zero, as where there are none, any normal will do.
        """
        cell = ((y - self.low) / self.voxel).floor().long()
        inside = ((cell >= 0) & (cell < self.size)).all(-1)
        table = len(self._near) - 1
        row = self._row(cell)
        if normals is None:
            k = self._near[table][row]
        else:
            alike = (normals @ _directions().T.to(normals)).abs()
            best = alike.argmax(-1)
            k = self._near[torch.where((normals == 0).all(-1), table, best), row]
        k = torch.where(inside, k, self._count)
        centre, normal = self._points[k], self._normals[k]
        v = y - centre
        along = v - (v * normal).sum(-1, keepdim=True) * normal
        return centre + along * (self._radii[k][..., None] / along.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp(max=1)

    def squared(self, y: Tensor, normals: Tensor | None = None) -> Tensor:
        """Squared distances (...) of y (..., 3) to the surface, at most tau^2."""
        return (y - self.nearest(y, normals)).square().sum(-1).clamp(max=self.tau**2)
