"""The loss of one (sample, condition, pair): the mean over its d values of l(eps_c(alpha x0 + sigma eps) - eps).

It is taken of eps whatever the network predicts, so that it means the same for every family: at one noise level the errors of eps,
x0, v and flow differ by a factor, ||eps - eps^|| = (alpha / sigma) ||x0 - x0^|| = alpha ||v - v^|| (variance preserving)
= (1 - u) ||flow - flow^||.

Differences between classes can be 10,000 times smaller than the losses. The error of eps is taken, squared and summed in
float64, which keeps the difference of two losses as exact as (e_2 - e_1) . (2 eps - e_1 - e_2) is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.errors import unknown
from genkit.levels import Level
from genkit.scoring.plan import Pairs

_HUBER = 1.0  # where the loss turns from squared to absolute, in units of the noise's standard deviation

METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": torch.square,
    "l1": torch.abs,
    "huber": lambda e: torch.nn.functional.huber_loss(e, torch.zeros_like(e), reduction="none", delta=_HUBER),
}


def check_metric(name: str) -> None:
    """Raise ValueError for a metric that is not there."""
    if name not in METRICS:
        raise unknown("metric", name, METRICS)


def row_losses(denoiser: Denoiser, x0: Tensor, level: Level, eps: Tensor, cond: Cond, metric: str = "l2") -> Tensor:
    """Losses (B,) in float64, row by row.

    Args:
        x0, eps: clean samples and noise (B, ...).
        level: their levels, batched.
        cond: their conditions; empty for an unconditional model.
    """
    error = _double(denoiser(level.diffuse(x0, eps), level, cond).eps) - _double(eps)
    return METRICS[metric](error).flatten(1).mean(1)


def _double(value: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (value.cpu() if value.device.type == "mps" else value).double()


@torch.no_grad()
def grid_losses(denoiser: Denoiser, x0: Tensor, pairs: Pairs, cond: Cond, metric: str, batch_size: int) -> Tensor:
    """See `Denoiser.losses`."""
    check_metric(metric)
    shape = (len(x0), len(cond), len(pairs))
    losses = torch.empty(shape, dtype=torch.float64)
    noise = pairs.noise(range(len(pairs)))
    for rows in torch.arange(losses.numel()).split(batch_size):
        i, k, n = (torch.from_numpy(v) for v in np.unravel_index(rows.numpy(), shape))
        condition = Cond({name: v[k.to(v.device)] for name, v in cond.tensors.items()})
        values = row_losses(denoiser, x0[i], pairs.level[n], noise[n].to(x0), condition, metric)
        losses.view(-1)[rows] = values.cpu()
    return losses
