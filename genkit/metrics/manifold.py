"""Precision, recall, density and coverage of generated samples, from nearest neighbours in a feature space.

With B_k(r) the ball around a real feature r that reaches to its k-th nearest other real feature (and likewise for generated g):

    precision = mean_g [ g in some B_k(r) ]              recall   = mean_r [ r in some B_k(g) ]
    density   = mean_g #{r : g in B_k(r)} / k            coverage = mean_r [ some g in B_k(r) ]

(Kynkaanniemi et al. 2019, arXiv 1904.06991; Naeem et al. 2020, arXiv 2002.09797.)
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

K = 5
_ROWS = 1024  # of the table of distances, at a time


@dataclasses.dataclass(frozen=True)
class Manifold:
    """What each metric is the mean of: of each generated sample (N,), or of each real one (M,); float64.

    Example:
        >>> Manifold.of(generated, real).recall.mean()
    """

    precision: Tensor  # (N,) 0 or 1
    recall: Tensor  # (M,) 0 or 1
    density: Tensor  # (N,)
    coverage: Tensor  # (M,) 0 or 1

    @classmethod
    def of(cls, generated: Tensor, real: Tensor, k: int = K) -> Manifold:
        """Of features (N, D) against real features (M, D).

        Args:
            k: which neighbour bounds a ball (5 in Naeem et al.; Kynkaanniemi et al. have 3).

        Raises:
            ValueError: fewer than k + 1 samples, or different widths.
        """
        if min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
            shapes = f"{tuple(generated.shape)} and {tuple(real.shape)}"
            raise ValueError(f"Features of shapes {shapes} cannot be compared with k={k}: both need more than k rows of one width.")
        g, r = generated.double(), real.double()
        real_radius, generated_radius = _radii(r, k), _radii(g, k)
        inside, recalled, covered = [], torch.zeros(len(r), dtype=torch.bool), torch.zeros(len(r), dtype=torch.bool)
        for start in range(0, len(g), _ROWS):
            distance = torch.cdist(g[start : start + _ROWS], r)
            in_real = distance <= real_radius
            inside.append(in_real.sum(1))
            covered |= in_real.any(0)
            recalled |= (distance <= generated_radius[start : start + _ROWS, None]).any(0)
        balls = torch.cat(inside).double()
        return cls((balls > 0).double(), recalled.double(), balls / k, covered.double())


def manifold_metrics(generated: Tensor, real: Tensor, k: int = K) -> dict[str, float]:
    """Precision, recall, density and coverage of features (N, D) against real features (M, D).

    Raises:
        ValueError: fewer than k + 1 samples, or different widths.

    Example:
        >>> manifold_metrics(judge.features(images), judge.features(real_images))["recall"]
    """
    found = Manifold.of(generated, real, k)
    return {field.name: getattr(found, field.name).mean().item() for field in dataclasses.fields(Manifold)}


def expected_coverage(generated: int, real: int, k: int = K) -> float:
    """Coverage of samples of the very distribution of the real ones, by how many there are of each: at best this can be expected.

        1 - (M - 1) ... (M - k) / ((M + N - 1) ... (M + N - k))

    since a real sample is missed if its k nearest among all others are real (Naeem et al. 2020).
    """
    return 1 - math.prod((real - i) / (real + generated - i) for i in range(1, k + 1))


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance (N,) of each feature to its k-th nearest other one."""
    parts = [torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(_ROWS)]
    return torch.cat(parts)
