"""How much surface is near a place: the density of a part or a template, smoothed, by table look-up.

    rho(y) = sum_i a_i exp(-|y - x_i|^2 / 2 h^2) / (2 pi h^2)          a_i the area that sample i stands for

It is 1 on a large plane, 2 on a thin board, 0 far away. Densities add up: those of the parts of a right assembly make the
template's. A part that lies inside of another one makes twice the template's there, which no distance to the nearest point notices.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

PER_WIDTH = 2.0  # voxels in a width h
REACH = 3.0  # widths around the samples that the grid has


class DensityGrid:
    """The density of a surface.

    Args:
        points: samples (N, 3).
        areas: that each stands for (N,).
        width: h.

    Example:
        >>> DensityGrid(board, areas, 0.03)(board).mean()      # about 2 for a board thinner than 0.03
    """

    def __init__(self, points: Tensor, areas: Tensor, width: float) -> None:
        voxel = width / PER_WIDTH
        self.low = points.amin(0) - REACH * width
        size = ((points.amax(0) + REACH * width - self.low) / voxel).ceil().long() + 1
        # Each sample is shared out among the eight voxels around it, so that where the grid begins makes no difference.
        place = (points - self.low) / voxel
        corner = place.floor().long()
        mass = torch.zeros(int(size.prod()), dtype=points.dtype, device=points.device)
        for offset in torch.cartesian_prod(*[torch.arange(2, device=points.device)] * 3):
            share = (1 - (place - corner - offset).abs()).prod(-1)
            i, j, k = (corner + offset).unbind(-1)
            mass.index_add_(0, (i * size[1] + j) * size[2] + k, areas.to(points) * share)
        smooth = gaussian_filter(mass.reshape(size.tolist()).cpu().numpy(), PER_WIDTH, truncate=REACH, mode="constant")
        factor = math.sqrt(2 * math.pi) * width / voxel**3
        self._grid = (factor * torch.from_numpy(smooth)).to(points)[None, None]
        # grid_sample counts axes backwards, in units where the outermost voxels are at -1 and 1.
        self._scale = 2 / ((size - 1) * voxel)

    def __call__(self, y: Tensor) -> Tensor:
        """Density (...) at places y (..., 3)."""
        place = ((y - self.low) * self._scale - 1).flip(-1)
        return F.grid_sample(self._grid, place.reshape(1, 1, 1, -1, 3), align_corners=True).reshape(y.shape[:-1])
