"""Nearest neighbours and Chamfer distance of point clouds.

CD(a, b) = mean_i min_j |a_i - b_j|^2 + mean_j min_i |a_i - b_j|^2          (Fan et al. 2017; both directions summed)
"""

from __future__ import annotations

import torch
from scipy.spatial import KDTree
from torch import Tensor

ROWS = 2048  # of a distance matrix that are in memory at once, on a GPU


def nearest(queries: Tensor, points: Tensor, tree: KDTree | None = None) -> tuple[Tensor, Tensor]:
    """Distance (N,) from each query (N, 3) to the nearest of points (M, 3), and its number (N,).

    Args:
        tree: of the points, if it is there already; used on the CPU, where a KD-tree is fastest. Elsewhere a distance matrix is,
            some rows at a time. No gradient flows through either.
    """
    queries, points = queries.detach(), points.detach()
    if queries.device.type == "cpu":
        distance, index = (tree or KDTree(points.numpy())).query(queries.numpy())
        return torch.from_numpy(distance).to(queries), torch.from_numpy(index).long()
    parts = [torch.cdist(rows, points).min(1) for rows in queries.split(ROWS)]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Chamfer distance () of clouds (N, 3) and (M, 3): mean squared distance to the nearest point, both directions summed.

    Example:
        >>> chamfer(torch.zeros(1, 3), torch.tensor([[0.1, 0.0, 0.0]]))      # 0.02
    """
    return nearest(a, b)[0].square().mean() + nearest(b, a)[0].square().mean()
