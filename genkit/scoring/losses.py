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

from genkit.attention.folding import Evaluator, evaluator, tiled
from genkit.denoisers.base import Cond, Denoiser
from genkit.errors import unknown
from genkit.levels import Level
from genkit.prediction import Prediction
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
    return _losses(denoiser(level.diffuse(x0, eps), level, cond), eps, metric)


def shared_losses(
    evaluate: Evaluator, x0: Tensor, level: Level, eps: Tensor, samples: Tensor, prompts: Tensor, metric: str = "l2"
) -> Tensor:
    """Losses (B,) in float64 of rows that share samples and prompts.

    Args:
        evaluate: of the denoiser and its prompts.
        x0, level, eps: of the distinct samples (U, ...).
        samples, prompts: of each row (B,).
    """
    prediction = evaluate(level.diffuse(x0, eps), level, samples, prompts)
    return _losses(prediction, eps[samples.to(eps.device)], metric)


def _losses(prediction: Prediction, eps: Tensor, metric: str) -> Tensor:
    return METRICS[metric](_double(prediction.eps) - _double(eps)).flatten(1).mean(1)


def _double(value: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return (value.cpu() if value.device.type == "mps" else value).double()


@torch.no_grad()
def grid_losses(
    denoiser: Denoiser, x0: Tensor, pairs: Pairs, cond: Cond, metric: str, batch_size: int, fold: bool = True
) -> Tensor:
    """See `Denoiser.losses`."""
    check_metric(metric)
    losses = torch.empty(len(x0) * len(pairs), len(cond), dtype=torch.float64)
    noise, evaluate = pairs.noise(range(len(pairs))), evaluator(denoiser, cond, fold=fold)
    samples, prompts = np.indices(losses.shape).reshape(2, -1)
    for items in np.array_split(tiled(samples, prompts, batch_size), range(batch_size, losses.numel(), batch_size)):
        noised, places = torch.unique(torch.from_numpy(samples[items]), return_inverse=True)
        i, n = noised // len(pairs), noised % len(pairs)
        eps, rows = noise[n].to(x0), torch.from_numpy(prompts[items])
        losses.view(-1)[items] = shared_losses(evaluate, x0[i], pairs.level[n], eps, places, rows, metric).cpu()
    return losses.reshape(len(x0), len(pairs), len(cond)).transpose(1, 2)
