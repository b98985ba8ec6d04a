"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features, without bias.

    k(x, y) = (x . y / D + 1)^3
    MMD_u^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

The distance is the mean over subsets, drawn without replacement (Binkowski et al. 2018, arXiv 1801.01401: 100 subsets of 1,000).
Its interval is the delete-d jackknife's: subsets of m of n rows that spread by s say that all n spread by s sqrt(m / (n - m))
(Shao & Wu 1989). Of two equal distributions the distance is 0 on average, so single ones are negative as often as not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genkit.metrics.estimate import Estimate

SUBSETS, SUBSET = 100, 1000
LEAST = 4  # rows: halves of which two are left


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """MMD_u^2 of features (N, D) and (M, D), in float64.

    Raises:
        ValueError: fewer than two rows, or different widths.

    Example:
        >>> squared_mmd(torch.zeros(2, 1), torch.ones(2, 1))    # k is 1 among zeros, 8 among ones, 1 across
        7.0
    """
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"Cannot compare features of shapes {tuple(x.shape)} and {tuple(y.shape)}.")
    x, y = x.double(), y.double()
    return (_within(x) + _within(y) - 2 * _kernel(x, y).mean()).item()


def kernel_distance(x: Tensor, y: Tensor, *, subsets: int = SUBSETS, subset: int = SUBSET, seed: int = 0) -> Estimate:
    """Mean of MMD_u^2 over subsets of features (N, D) and (M, D), and its 95 % interval.

    Args:
        subsets: how many, 100 in the paper.
        subset: rows of each, 1,000 in the paper; at most half of the smaller set, which the interval needs.
        seed: of the subsets.

    Raises:
        ValueError: fewer than 4 rows or 2 subsets, or different widths.
    """
    n = min(len(x), len(y))
    if n < LEAST or subsets < 2:
        raise ValueError(f"Kernel distances need {LEAST} rows and 2 subsets at least; got {n} rows, {subsets} subsets.")
    m, generator = subset_size(n, subset), torch.Generator().manual_seed(seed)

    def rows(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:m]

    drawn = torch.tensor([squared_mmd(x[rows(len(x))], y[rows(len(y))]) for _ in range(subsets)], dtype=torch.float64)
    value, spread = drawn.mean().item(), 1.96 * drawn.std().item() * math.sqrt(m / (n - m))
    return Estimate(value, value - spread, value + spread, len(x))


def subset_size(rows: int, subset: int = SUBSET) -> int:
    """Rows of a subset of a set of `rows`."""
    return max(2, min(subset, rows // 2))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> Tensor:
    """Mean kernel of two different rows."""
    k, n = _kernel(x, x), len(x)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))
