"""Precision, recall, density and coverage of generated samples, from nearest neighbours in a feature space.

With B_k(r) the ball around a real feature r that reaches to its k-th nearest other real feature (and likewise for generated g):

    precision = mean_g [ g in some B_k(r) ]              recall   = mean_r [ r in some B_k(g) ]
    density   = mean_g #{r : g in B_k(r)} / k            coverage = mean_r [ some g in B_k(r) ]

(Kynkaanniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def manifold_metrics(generated: Tensor, real: Tensor, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, D) against real features (M, D).

    Args:
        k: which neighbour bounds a ball (5 in Naeem et al.; Kynkaanniemi et al. have 3).

    Raises:
        ValueError: fewer than k + 1 samples, or different widths.

    Example:
        >>> manifold_metrics(judge.features(images), judge.features(real_images))["recall"]
    """
    if min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        shapes = f"{tuple(generated.shape)} and {tuple(real.shape)}"
        raise ValueError(f"Features of shapes {shapes} cannot be compared with k={k}: both need more than k rows of one width.")
    g, r = generated.double(), real.double()
    real_radius, generated_radius = _radii(r, k), _radii(g, k)
    distance = torch.cdist(g, r)  # (N, M)
    in_real = distance <= real_radius
    return {
        "precision": in_real.any(1).double().mean().item(),
        "recall": (distance <= generated_radius[:, None]).any(0).double().mean().item(),
        "density": in_real.sum(1).double().mean().item() / k,
        "coverage": in_real.any(0).double().mean().item(),
    }


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) of each feature to its k-th nearest other one."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values
