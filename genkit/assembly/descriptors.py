"""What a list of parts says of the whole, whatever poses they are in: a few numbers of each part that no motion changes.

    f_p = (sqrt(a_p), sqrt(eigenvalues of Cov(x_p)), quantiles of |x_p - mean x_p|) / L,      L = sqrt(sum_p a_p)

a_p is the area of part p, x_p its samples. L makes them free of the unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEATURES = 4 + len(QUANTILES)


def part_features(points: Tensor, areas: Tensor) -> Tensor:
    """f (P, 9), float32, of parts.

    Args:
        points: samples (P, N, 3) of each surface, area-uniform, in any pose.
        areas: (P,), in squares of the same unit.

    Example:
        >>> part_features(parts.points, parts.areas)
    """
    y = points.double() - points.double().mean(1, keepdim=True)
    spread = torch.linalg.eigvalsh(y.mT @ y / y.shape[1]).clamp_min(0).sqrt()
    radii = y.norm(dim=-1).quantile(torch.tensor(QUANTILES, dtype=torch.float64), dim=1).T
    features = torch.cat([areas.double()[:, None].sqrt(), spread, radii], 1)
    return (features / areas.double().sum().sqrt()).float()
