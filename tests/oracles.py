"""Exact references in plain float64: what the tests compare with. Nothing here uses genkit, so nothing is compared with itself.

Setting G of the guidance spec: data N(1, .5^2), model N(.6, .8^2), the same for each coordinate. Everything about it is affine or
quadratic, and so is every sampler: two initial samples tell mean and standard deviation of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

REAL = (1.0, 0.5)
MODEL = (0.6, 0.8)


def gaussian_score(x: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """Score of alpha x0 + sigma eps, x0 ~ N(mean, std^2)."""
    return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def gaussian_x0(x: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """E[x0 | x]."""
    v = alpha**2 * std**2 + sigma**2
    return (sigma**2 * mean + alpha * std**2 * x) / v


def gaussian_eps(x: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """E[eps | x]."""
    return -sigma * gaussian_score(x, alpha, sigma, mean, std)


def ratio_gradient(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """grad log p_data / p_model at x, in setting G."""
    return gaussian_score(x, alpha, sigma, *REAL) - gaussian_score(x, alpha, sigma, *MODEL)


def gaussian_log_density(x: Tensor, alpha: float, sigma: float, mean: float, std: float) -> Tensor:
    """log N(x; alpha mean, alpha^2 std^2 + sigma^2) of each coordinate."""
    v = alpha**2 * std**2 + sigma**2
    return -0.5 * ((x - alpha * mean) ** 2 / v + math.log(2 * math.pi * v))


def affine(run: Callable[[Tensor], Tensor], scale: float) -> tuple[float, float]:
    """(mean, std) of run(x_T) for x_T ~ N(0, scale^2), if run is affine: from x_T = 0 and x_T = scale.

    A third point proves that it is affine. `run` takes and returns (B, 1).
    """
    at_zero, at_one, at_two = run(torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64) * scale)[:, 0].double().tolist()
    assert abs(at_two - 2 * at_one + at_zero) < 1e-4 * (1 + abs(at_two)), "the sampler is not affine"
    return at_zero, abs(at_one - at_zero)


def karras_sigmas(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """The EDM schedule (n,), without the final zero (Karras et al. 2022, eq. 5)."""
    ramp = np.arange(n) / (n - 1)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def linear_abar(n: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """abar (n,) of the linear beta schedule (Ho et al. 2020)."""
    return np.cumprod(1 - np.linspace(start, end, n))


def sigma_of_tau(tau: float, beta_min: float = 0.1, beta_max: float = 20.0) -> float:
    """Noise-to-signal ratio at time tau of the linear VP-SDE: sqrt(exp(B) - 1)."""
    return math.sqrt(math.expm1(0.5 * tau**2 * (beta_max - beta_min) + beta_min * tau))


def mixture_score(x: float, alpha: float, sigma: float, means: list[float], stds: list[float], weights: list[float]) -> float:
    """Score of a one-dimensional mixture seen through noise, by summing densities."""
    variances = [alpha**2 * s**2 + sigma**2 for s in stds]
    densities = [
        w * math.exp(-0.5 * (x - alpha * m) ** 2 / v) / math.sqrt(v) for m, v, w in zip(means, variances, weights, strict=True)
    ]
    slopes = [-(x - alpha * m) / v for m, v in zip(means, variances, strict=True)]
    return sum(d * s for d, s in zip(densities, slopes, strict=True)) / sum(densities)


def mixture_log_density(x: float, alpha: float, sigma: float, means: list[float], stds: list[float], weights: list[float]) -> float:
    """log p(x) of the same."""
    total = 0.0
    for m, s, w in zip(means, stds, weights, strict=True):
        v = alpha**2 * s**2 + sigma**2
        total += w / sum(weights) * math.exp(-0.5 * (x - alpha * m) ** 2 / v) / math.sqrt(2 * math.pi * v)
    return math.log(total)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output, log-sum-exp, row entropy, probabilities) of softmax attention, with the whole matrix; differentiable.

    q (B, H, L, D), k (B, H, S, D), v (B, H, S, E); the mask is boolean (True attends) or added to the logits. A row that attends to
    nothing has probabilities, output and entropy 0, and -inf.
    """
    logits = torch.einsum("bhld,bhsd->bhls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    closed = logits == -math.inf
    empty = closed.all(-1)
    finite = torch.where(closed, 0.0, logits)  # so that no gradient runs through an infinity
    weights = torch.where(closed, 0.0, torch.exp(finite - finite.amax(-1, keepdim=True).detach()))
    probabilities = weights / weights.sum(-1, keepdim=True).masked_fill(empty[..., None], 1.0)
    lse = torch.logsumexp(torch.where(closed & ~empty[..., None], -math.inf, finite), -1)
    entropy = torch.where(empty, 0.0, (probabilities * (lse[..., None] - finite)).sum(-1))
    return probabilities @ v, torch.where(empty, -math.inf, lse), entropy, probabilities
