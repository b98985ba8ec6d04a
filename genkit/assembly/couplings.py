"""Where each point of an assembly should go: four ways of matching it with a template, and denoisers as one of them.

A template is a cloud S = {s_k}. Read as a distribution, a diffusion model that knew it would predict, at the noise level h =
sigma / alpha,

    soft    D(y) = sum_k softmax_k(-|y - s_k|^2 / 2 h^2) s_k            the posterior mean
    nn      D(y) = the nearest s_k                                      its limit as h -> 0: one step is one of ICP
    ot      D(y_n) = sum_k T_nk s_k / sum_k T_nk                        T the entropic transport of cost |y - s_k|^2,
                                                                        epsilon = 2 h^2: each template point is used once
    index   D(y_n) = s_n                                                for targets in the order of the points, as denoisers give
    them

With D frozen, the gradient of score distillation on the poses is that of (alpha / 2 sigma) |Y(g) - D|^2, which Kabsch minimises
at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from genkit.assembly.distances import nearest

Coupling = Literal["index", "nn", "soft", "ot"]
SINKHORN_SWEEPS = 30


class Target(Protocol):
    """Of assemblies (H, M, 3), at a noise level h, where each point should go (H, M, 3)."""

    def __call__(self, y: Tensor, h: float) -> Tensor: ...


def soft_targets(y: Tensor, template: Tensor, h: float, mode: Coupling = "ot", chunk: int | None = None) -> Tensor:
    """Targets (H, M, 3) of assemblies' points y (H, M, 3) on a template (K, 3).

    Args:
        h: noise level over signal level, in lengths of y; for `soft` and `ot`.
        chunk: assemblies at a time, all by default. The result does not depend on it.

    Raises:
        ValueError: an unknown mode; `index` where the template has not as many points as y; h that is not positive.

    Example:
        >>> soft_targets(y, scan, h=0.02, mode="nn")
    """
    if mode not in ("index", "nn", "soft", "ot"):
        raise ValueError(f"Unknown coupling {mode!r}. Known: index, nn, soft, ot.")
    if mode == "index":
        if template.shape != y.shape[-2:]:
            raise ValueError(f"The coupling 'index' needs a template of {y.shape[-2]} points; it has {len(template)}.")
        return template.expand_as(y)
    if mode == "nn":
        return template[nearest(y.reshape(-1, 3), template)[1]].reshape(y.shape)
    if not h > 0:
        raise ValueError(f"h={h} must be positive for the coupling {mode!r}.")
    one = _soft if mode == "soft" else _transport
    return torch.cat([one(rows, template, h) for rows in y.split(chunk or len(y))])


def _soft(y: Tensor, template: Tensor, h: float) -> Tensor:
    return (
        torch.softmax(-torch.cdist(y, template[None], compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * h * h), -1)
        @ template
    )


def _transport(y: Tensor, template: Tensor, h: float) -> Tensor:
    """Barycentric projection of the entropic plan, by Sinkhorn's sweeps on log-potentials (Cuturi 2013)."""
    score = -torch.cdist(y, template[None], compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * h * h)
    log_a, log_b = -math.log(score.shape[-2]), -math.log(score.shape[-1])
    v = torch.zeros_like(score[..., :1, :])
    for _ in range(SINKHORN_SWEEPS):
        u = log_a - (score + v).logsumexp(-1, keepdim=True)
        v = log_b - (score + u).logsumexp(-2, keepdim=True)
    return torch.softmax(score + v, -1) @ template


class TemplateTarget:
    """Targets on one template for all assemblies, or on one of several for each.

    Args:
        template: (K, 3), or (H, K, 3), the first axis that of the assemblies.
        coupling: as in `soft_targets`.
    """

    def __init__(self, template: Tensor, coupling: Coupling = "ot", chunk: int | None = None) -> None:
        self.template, self.coupling, self.chunk = template, coupling, chunk

    def __call__(self, y: Tensor, h: float) -> Tensor:
        if self.template.ndim == 2:
            return soft_targets(y, self.template.to(y), h, self.coupling, self.chunk)
        pairs = zip(y, self.template.to(y), strict=True)
        return torch.cat([soft_targets(one[None], template, h, self.coupling) for one, template in pairs])


class DenoisedTarget:
    """Targets of a diffusion model: noise the assembly, denoise it, match by index (the published method).

    Args:
        eps: `(noisy (H, M, 3), h) -> predicted noise (H, M, 3)`.
        noise: `(H, M, 3) shape -> noise`, fresh at each call.

    The noise levels are alpha = 1 / sqrt(1 + h^2) and sigma = h alpha, those of a variance-preserving process.
    """

    def __init__(self, eps: Callable[[Tensor, float], Tensor], noise: Callable[[torch.Size], Tensor]) -> None:
        self.eps, self.noise = eps, noise

    def __call__(self, y: Tensor, h: float) -> Tensor:
        alpha = 1 / math.sqrt(1 + h * h)
        sigma = h * alpha
        noisy = alpha * y + sigma * self.noise(y.shape).to(y)
        return (noisy - sigma * self.eps(noisy, h)) / alpha
