"""Frechet distance of two sets of features under a Gaussian fit (Dowson & Landau 1982; Heusel et al. 2017, arXiv 1706.08500).

d^2 = ||mu1 - mu2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
"""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.metrics.estimate import REPLICATES, Estimate, centred, counts


def frechet_distance(features1: Tensor, features2: Tensor) -> float:
    """d^2 between features (N, D) and (M, D), in float64; the covariances are those of N - 1 and M - 1.

    Raises:
        ValueError: fewer than two samples, or different widths.
    """
    return frechet_estimate(features1, features2, replicates=0).value


def frechet_estimate(features: Tensor, reference: Tensor, *, replicates: int = REPLICATES, seed: int = 0) -> Estimate:
    """The distance of features (N, D) to a reference (M, D), with a bootstrap interval.

    The features are resampled, the reference stays as it is: it belongs to the definition of the figure. The interval is that of
    this N: a distance of fewer samples is larger, see `genkit.metrics.evaluation.shortage`. It errs on the wide side: resampling
    adds noise to covariances that have some. Six sets of 1,000 real training digits spread by 6 % (one standard deviation, in the
    judge's features), of which the bootstrap made 11 %.

    Raises:
        ValueError: fewer than two samples, or different widths.
    """
    if min(len(features), len(reference)) < 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"Cannot compare features of shapes {tuple(features.shape)} and {tuple(reference.shape)}.")
    x, y = features.double(), reference.double()
    mu, cov = y.mean(0), _covariance(y)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T

    def distance(weights: Tensor) -> Tensor:
        """Of the rows as often as the weights (N,) say."""
        mean, s = weights.double() @ x / len(x), _covariance(x, weights)
        # S1^(1/2) S2 S1^(1/2) has the eigenvalues of S1 S2, and is symmetric.
        shared = torch.linalg.eigvalsh(root @ s @ root).clamp_min(0).sqrt().sum()
        return ((mean - mu).square().sum() + s.trace() + cov.trace() - 2 * shared).clamp_min(0)  # rounding

    value = distance(torch.ones(len(x), dtype=torch.int64)).item()
    drawn = [distance(weights) for weights in counts(len(x), replicates, seed)]
    return centred(value, torch.stack(drawn) if drawn else torch.empty(0), len(x))


def _covariance(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """(D, D) of rows (N, D), each as often as its weight says."""
    return torch.cov(x.T, fweights=weights).reshape(x.shape[1], -1)
