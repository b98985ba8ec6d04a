"""Eight Gaussian modes on a ring in the plane: data whose every property is known, for methods that can lose modes or their width.

    k ~ U{0..7},  x = R (cos 2 pi k/8, sin 2 pi k/8) + s n,  n ~ N(0, I)         R = 1.5, s = 0.12

Samples are compared with the ring by the squared maximum mean discrepancy (Gretton et al. 2012) summed over three kernels,

    MMD^2 = sum_h E k_h(x, x') + E k_h(y, y') - 2 E k_h(x, y),      k_h(x, y) = exp(-|x - y|^2 / 2 h^2),   h in {0.1, 0.5, 1}

from the width of a mode to the size of the ring. Samples of the ring have about 0, and a point in its middle 2.77.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MODES, RADIUS, STD = 8, 1.5, 0.12
BANDWIDTHS = (0.1, 0.5, 1.0)
WITHIN = 3.0  # standard deviations from a mode that still count as its own


def centres() -> Tensor:
    """The means of the modes (8, 2)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def points(count: int, seed: int = 0) -> Tensor:
    """Samples (count, 2) of the ring, float32, independent."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.randint(MODES, (count,), generator=generator)
    return centres()[mode] + STD * torch.randn(count, 2, generator=generator)


def mmd2(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of samples (N, 2) and (M, 2), without bias: of equal distributions it is about 0, +- 1/N.

    Raises:
        ValueError: fewer than two samples, or no points of the plane.
    """
    for values in (x, y):
        if values.ndim != 2 or values.shape[1] != 2 or len(values) < 2:
            raise ValueError(f"Samples of shape {tuple(values.shape)} cannot be compared. Give points (N, 2), two or more.")

    def mean(a: Tensor, b: Tensor) -> float:
        """E sum_h k_h(a, b); a sample is not compared with itself."""
        squares, same = torch.cdist(a, b).square(), a is b
        total = sum(torch.exp(squares / (-2 * h**2)).sum(dtype=torch.float64).item() for h in BANDWIDTHS)
        return (total - len(BANDWIDTHS) * len(a) * same) / (len(a) * (len(b) - same))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def ring_metrics(x: Tensor, reference: Tensor) -> dict[str, float]:
    """What became of the ring in samples x (N, 2).

    Args:
        reference: samples (M, 2) of the ring.

    Returns:
        "mmd": 1,000 MMD^2; "hq": share of samples within three standard deviations of a mode; "min_mode": the smallest share of
        one mode in all samples, those within; "std": the standard deviation of a coordinate about the mode, of those within, if
        there are any.

    Raises:
        ValueError: as `mmd2`.
    """
    mmd = mmd2(x, reference)
    distance, mode = torch.cdist(x.double(), centres().double()).min(1)
    near = distance <= WITHIN * STD
    shares = torch.bincount(mode[near], minlength=MODES) / len(x)
    metrics = {"mmd": 1000 * mmd, "hq": near.double().mean().item(), "min_mode": shares.min().item()}
    if near.any():
        metrics["std"] = (distance[near].square().mean() / 2).sqrt().item()
    return metrics
