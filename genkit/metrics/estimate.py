"""A figure with its interval, and the bootstrap (Efron 1979) of a mean."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

LEVEL = 0.95
REPLICATES = 200


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure `value` of `count` samples, with its 95 % interval from `low` to `high`."""

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(values: Tensor, *, replicates: int = REPLICATES, seed: int = 0) -> Estimate:
    """The mean of values (N,), with the percentile interval of resampled means.

    Args:
        replicates: 0 gives an interval of nothing, `low` = `value` = `high`.

    Raises:
        ValueError: no values.

    Example:
        >>> bootstrap_mean(torch.tensor([0.0, 1.0, 1.0, 1.0])).value
        0.75
    """
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of shape {tuple(values.shape)} have no mean. Give a vector.")
    values = values.double()
    means = counts(len(values), replicates, seed).double() @ values / len(values)
    return centred(values.mean().item(), means, len(values))


def counts(size: int, replicates: int, seed: int) -> Tensor:
    """How often each of `size` rows is drawn in each replicate (R, N): N draws with replacement. A function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(size, (replicates, size), generator=generator)
    return torch.zeros(replicates, size, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


def centred(value: float, replicates: Tensor, count: int) -> Estimate:
    """`value` with the spread of its replicates (R,) around their own mean, as quantiles.

    A replicate has rows twice and others not at all. That alone moves what is no mean, a Frechet distance upwards; where the
    replicates lie then says nothing, how far they spread does.
    """
    if not len(replicates):
        return Estimate(value, value, value, count)
    deviations = replicates - replicates.mean()
    low, high = deviations.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=deviations.dtype)).tolist()
    return Estimate(value, value + low, value + high, count)
