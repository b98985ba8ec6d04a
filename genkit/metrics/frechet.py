"""Frechet distance of two sets of features under a Gaussian fit (Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500).

d^2 = ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features1: Tensor, features2: Tensor) -> float:
    """d^2 between features (N, D) and (M, D), in float64; the covariances are those of N - 1 and M - 1.

    Raises:
        ValueError: fewer than two samples, or different widths.
    """
    if min(len(features1), len(features2)) < 2 or features1.shape[1] != features2.shape[1]:
        raise ValueError(f"Cannot compare features of shapes {tuple(features1.shape)} and {tuple(features2.shape)}.")
    f1, f2 = features1.double(), features2.double()
    s1, s2 = torch.cov(f1.T), torch.cov(f2.T)
    # tr (S1 S2)^(1/2) from the eigenvalues of S1 S2, which are those of a positive semi-definite matrix, so real and >= 0.
    eigenvalues = torch.linalg.eigvals(s1 @ s2).real.clamp_min(0)
    return ((f1.mean(0) - f2.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * eigenvalues.sqrt().sum()).item()
