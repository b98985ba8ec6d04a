"""Exact denoisers: the posterior mean E[x0 | x] of data whose density is known.

Data is a mixture of diagonal Gaussians, p(x0) = sum_k w_k N(x0; m_k, s_k^2). At the level x = a x0 + s eps each component
stays Gaussian, with variance v_k = a^2 s_k^2 + s^2, so with r_k = x - a m_k

    x0_k  = m_k + (a s_k^2 / v_k) r_k               posterior mean under component k
    eps_k = (s / v_k) r_k
    p_k   = w_k N(x; a m_k, v_k) / p(x)             posterior weight of component k
    x0    = sum_k p_k x0_k,    eps = sum_k p_k eps_k,    score = -eps / s = grad log p(x)

(Karras et al. 2022, arXiv 2206.00364, appendix B.3, has it for s_k = 0.) No approximation, no network: what a method does on
such data is known in closed form, which is how the tests check samplers, guidance and classifiers without any checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Cond, Denoiser
from genkit.levels import Level, broadcast
from genkit.prediction import KINDS


class Mixture(nn.Module):
    """A mixture of K diagonal Gaussians seen through noise.

    Args:
        means: (K, *shape), or (K,) for means that are the same at every coordinate.
        stds: like means, or a number for all; zero makes a component a single point.
        weights: (K,), positive, of any sum.

    Raises:
        ValueError: shapes that do not fit, a negative std, or a weight that is not positive.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        super().__init__()
        if means.ndim < 1 or len(weights) != len(means):
            raise ValueError(f"There are means of shape {tuple(means.shape)} for {len(weights)} weights. Give one mean for each.")
        if stds.ndim and (len(stds) != len(means) or (stds.ndim > 1 and stds.shape != means.shape)):
            raise ValueError(
                f"stds of shape {tuple(stds.shape)} do not fit means of shape {tuple(means.shape)}. "
                f"Give one number, ({len(means)},) or {tuple(means.shape)}."
            )
        if not (stds >= 0).all() or not torch.isfinite(stds).all():
            raise ValueError("Each std must be zero or positive, and finite.")
        if not (weights > 0).all():
            raise ValueError(f"Weights must be positive; got {weights.tolist()}.")
        self.register_buffer("means", means)
        self.register_buffer("stds", stds.expand(len(means)) if stds.ndim == 0 else stds)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def components(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component at x (B, *shape): posterior means x0_k and eps_k (B, K, *shape), and log N(x; a m_k, v_k) (B, K)."""
        if self.means.ndim > 1 and self.means.shape[1:] != x.shape[1:]:
            raise ValueError(f"The samples are {tuple(x.shape[1:])} but the means are {tuple(self.means.shape[1:])}.")
        x = x.to(torch.promote_types(x.dtype, self.means.dtype)).unsqueeze(1)
        a, s = broadcast(level.alpha, x), broadcast(level.sigma, x)
        means, variances = self._aligned(self.means, x), self._aligned(self.stds, x) ** 2
        v = a**2 * variances + s**2
        residual = x - a * means
        log_density = -0.5 * (residual**2 / v + (2 * math.pi * v).log())
        return means + a * variances / v * residual, s / v * residual, log_density.flatten(2).sum(2)

    def forward(self, x: Tensor, level: Level, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior means of x0 and eps (B, *shape), and log p(x) (B,).

        Args:
            x: noisy samples (B, *shape).
            level: their noise level.
            allowed: (B, K) bool, the components of each sample's condition; None is all of them.
        """
        x0, eps, log_density = self.components(x, level)
        prior = self.log_weights.expand_as(log_density)
        if allowed is not None:
            prior = prior.masked_fill(~allowed.to(prior.device), -torch.inf)
        joint = prior + log_density
        p = joint.softmax(1).reshape(*joint.shape, *[1] * (x.ndim - 1))
        return (p * x0).sum(1), (p * eps).sum(1), joint.logsumexp(1) - prior.logsumexp(1)

    @staticmethod
    def _aligned(value: Tensor, x: Tensor) -> Tensor:
        """(K,) or (K, *shape) as (1, K, 1, ...) or (1, K, *shape), next to x (B, 1, *shape)."""
        return value.reshape(1, len(value), *([1] * (x.ndim - 2) if value.ndim == 1 else value.shape[1:]))


class GaussianMixtureDenoiser(Denoiser):
    """The exact denoiser of a mixture of diagonal Gaussians, class-conditional, at any level (VP, VE or flow).

    Args:
        means: K means, (K, *shape) for samples (B, *shape), or (K,) for means that are the same at every coordinate.
        stds: standard deviations: a number, (K,) or like `means`; 0 is a template.
        weights: (K,), positive, of any sum; uniform by default.
        classes: class label of each component; its number by default. A class may have several components.
        kind: what the predictions are: "eps", "x0", "v" or "flow".

    It computes in float64 unless it is moved to another dtype (`denoiser.network.float()`), and is differentiable in x.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, a negative std, or a weight that is not positive.

    Example:
        >>> denoiser = GaussianMixtureDenoiser([-1.0, 1.0], 0.5)
        >>> level = Level(alpha=1.0, sigma=1.0, t=0)
        >>> denoiser(torch.zeros(2, 1), level, denoiser.condition(labels=[0, 1])).x0     # -0.8 and 0.8
    """

    family = "analytic"
    classes = ()

    def __init__(
        self,
        means: Tensor | Sequence[Any],
        stds: Tensor | Sequence[Any] | float,
        weights: Tensor | Sequence[float] | None = None,
        *,
        classes: Sequence[int] | None = None,
        kind: str = "eps",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Unknown kind of prediction {kind!r}. Known: {', '.join(KINDS)}.")
        means = torch.as_tensor(means, dtype=torch.float64)
        count = len(means) if means.ndim else 1
        self.kind, self.codec = kind, None
        self._network = Mixture(
            means,
            torch.as_tensor(stds, dtype=torch.float64),
            torch.ones(count, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64),
        )
        self._class_of = torch.arange(count) if classes is None else torch.as_tensor(classes)
        if self._class_of.shape != (count,):
            raise ValueError(f"There are {count} components but {len(self._class_of)} class labels. Give one for each.")

    @property
    def network(self) -> Mixture:
        return self._network

    @property
    def device(self) -> torch.device:
        return self._network.means.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.means.dtype

    def condition(self, labels: Sequence[int] | Tensor) -> Cond:
        """The components of each sample's class; the null condition is the whole mixture.

        Raises:
            ValueError: a label that no component has.
        """
        wanted = torch.as_tensor(labels).reshape(-1, 1)
        allowed = wanted == self._class_of
        if not allowed.any(1).all():
            unknown = sorted({int(v) for v in wanted[~allowed.any(1)]})
            raise ValueError(f"No component has the class {unknown[0]}. Known: {sorted(set(self._class_of.tolist()))}.")
        return Cond({"components": allowed}, {"components": torch.ones_like(allowed)})

    def log_density(self, x: Tensor, level: Level, cond: Cond | None = None) -> Tensor:
        """Exact log p(x) (B,) of noisy samples x (B, *shape); of the class's density where a condition is given.

        Its gradient in x is the score. With `Level(1.0, 0.0, 0)` it is the density of clean data.
        """
        return self._network(x, level, None if cond is None else cond.tensors["components"])[2]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape (C, h, w) of one sample, that of the means.

        Raises:
            ValueError: the means are no pictures, or another size is asked for.
        """
        shape = tuple(self._network.means.shape[1:])
        if len(shape) != 3:
            raise ValueError(f"The means have shape {shape}. Give means (K, C, H, W) to make pictures of a known size.")
        wanted = (height or shape[1], width or shape[2])
        if wanted != shape[1:]:
            raise ValueError(f"The samples are {shape[1]} x {shape[2]}, not {wanted[0]} x {wanted[1]}.")
        return shape

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        x0, eps, _ = self._network(z, level, tensors.get("components"))
        if self.kind == "x0":
            return x0
        if self.kind == "eps":
            return eps
        if self.kind == "flow":
            return eps - x0
        a, s, n = (broadcast(c, x0) for c in (level.alpha, level.sigma, level.norm))
        return (a * eps - s * x0) / n

    def _evaluate(self, x: Tensor, level: Level, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        # The mixture takes x in any scheduler's variable: there is no input to scale and no output to precondition.
        return self._forward(x, level, tensors).to(torch.promote_types(x.dtype, torch.float32)), None


class GaussianDenoiser(GaussianMixtureDenoiser):
    """The exact denoiser of Gaussian data N(mean, diag std^2): x0 = m + a s_d^2 / (a^2 s_d^2 + s^2) (x - a m).

    It is affine in x, and so is any sampler that uses it: two samples tell the whole output distribution.

    Args:
        mean, std: numbers, or tensors of a sample's shape; std 0 is a single point.
        kind: what the predictions are: "eps", "x0", "v" or "flow".

    Example:
        >>> GaussianDenoiser(1.0, 0.5)(torch.zeros(1, 3, 8, 8), Level(alpha=0.6, sigma=0.8, t=0)).x0.mean()      # 0.8767
    """

    def __init__(self, mean: Tensor | Sequence[Any] | float, std: Tensor | Sequence[Any] | float, *, kind: str = "eps") -> None:
        mean = torch.as_tensor(mean, dtype=torch.float64)
        std = torch.as_tensor(std, dtype=torch.float64)
        if mean.ndim < std.ndim:
            mean = mean.expand_as(std)
        super().__init__(mean[None], std[None] if std.ndim else std, kind=kind)


class LinearDenoiser(Denoiser):
    """The exact denoiser of Gaussian data whose mean is linear in its condition: N(W y, s_d^2 I), y the tokens (S, D) side by side.

    x0 = W y + a s_d^2 / (a^2 s_d^2 + s^2) (x - a W y),  eps = s / (a^2 s_d^2 + s^2) (x - a W y). What a method that searches the
    condition should find is least squares.

    Args:
        weight: W (d, S D).
        std: s_d, positive or zero.
        kind: what the predictions are: "eps" or "x0".

    It computes in float64 unless it is moved, and is differentiable in sample and condition.

    Raises:
        ValueError: a weight that is no matrix, a negative std, an unknown kind.

    Example:
        >>> denoiser = LinearDenoiser(torch.randn(256, 64), 0.3)
        >>> denoiser(torch.zeros(2, 256), Level(alpha=0.6, sigma=0.8, t=0), denoiser.condition(torch.zeros(2, 1, 64))).x0.shape
    """

    family = "analytic"
    classes = ()
    inputs = ("embeds",)

    def __init__(self, weight: Tensor, std: float, *, kind: str = "eps") -> None:
        if weight.ndim != 2 or not std >= 0 or kind not in ("eps", "x0"):
            raise ValueError(f"weight {tuple(weight.shape)} must be (d, S D), std={std} not negative, kind={kind!r} eps or x0.")
        self.kind, self.codec, self.std = kind, None, std
        self._network = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64).requires_grad_(False)
        self._network.weight.copy_(weight)

    @property
    def network(self) -> nn.Linear:
        return self._network

    @property
    def device(self) -> torch.device:
        return self._network.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._network.weight.dtype

    def condition(self, embeds: Tensor) -> Cond:
        """Tokens (B, S, D) as they are; the null condition is zero."""
        return Cond({"embeds": embeds}, {"embeds": torch.zeros_like(embeds)})

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        z, a, s = z.to(self.dtype), broadcast(level.alpha, z), broadcast(level.sigma, z)
        mean = self._network(tensors["embeds"].flatten(1).to(self.dtype))
        residual, v = z - a * mean, (a * self.std) ** 2 + s**2
        return s / v * residual if self.kind == "eps" else mean + a * self.std**2 / v * residual

    def _evaluate(self, x: Tensor, level: Level, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return self._forward(x, level, tensors).to(torch.promote_types(x.dtype, torch.float32)), None
