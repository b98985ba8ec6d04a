"""One network output seen as eps, x0, v, flow or score.

With x = alpha x0 + sigma eps and n = sqrt(alpha^2 + sigma^2), m = alpha + sigma, the outputs are

    eps     noise
    x0      clean sample
    v       (alpha eps - sigma x0) / n       velocity of the variance-preserving variable x / n
    flow    eps - x0                          velocity of the rectified-flow variable x / m
    score   -eps / sigma                      gradient of log p(x)

Adding c to the score (guidance) changes each by a multiple of c, computed without leaving its own kind:

    eps -= sigma c     x0 += sigma^2/alpha c     v -= sigma n/alpha c     flow -= sigma m/alpha c
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.levels import Level, broadcast

KINDS = ("eps", "x0", "v", "flow")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A prediction of kind `kind` made at sample `x` and level `level`.

    Args:
        x: noisy sample (B, ...), in the scheduler's own variable.
        level: its noise level.
        raw: network output (B, ...), of kind "eps", "x0", "v" or "flow".
        kind: what `raw` is.
        variance: learned variance output (B, ...) of networks that have one; not used in conversions.

    Half-precision inputs are converted in float32; float64 stays float64.

    Raises:
        ValueError: unknown kind, or shapes of `x` and `raw` that differ.

    Example:
        >>> prediction = Prediction(x, level, unet(x, t).sample, "v")
        >>> prediction.x0, prediction.eps
        >>> guided = prediction.shifted(2.0 * gradient_of_log_potential)
    """

    x: Tensor
    level: Level
    raw: Tensor
    kind: str
    variance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown kind of prediction {self.kind!r}. Known: {', '.join(KINDS)}.")
        if self.x.shape != self.raw.shape:
            raise ValueError(f"The sample is {tuple(self.x.shape)} but the network output is {tuple(self.raw.shape)}.")

    def _xr(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(self.x.dtype, self.raw.dtype), torch.float32)
        return self.x.to(dtype), self.raw.to(dtype)

    def _coefficients(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        return broadcast(self.level.alpha, x), broadcast(self.level.sigma, x)

    @property
    def x0(self) -> Tensor:
        """Predicted clean sample (B, ...)."""
        x, raw = self._xr()
        a, s = self._coefficients(x)
        if self.kind == "x0":
            return raw
        if self.kind == "eps":
            return (x - s * raw) / a
        if self.kind == "v":
            n2 = a**2 + s**2
            return a / n2 * x - s / n2**0.5 * raw
        return (x - s * raw) / (a + s)

    @property
    def eps(self) -> Tensor:
        """Predicted noise (B, ...)."""
        x, raw = self._xr()
        a, s = self._coefficients(x)
        if self.kind == "eps":
            return raw
        if self.kind == "x0":
            return (x - a * raw) / s
        if self.kind == "v":
            n2 = a**2 + s**2
            return s / n2 * x + a / n2**0.5 * raw
        return (x + a * raw) / (a + s)

    @property
    def v(self) -> Tensor:
        """Velocity of the variance-preserving variable (B, ...)."""
        x, raw = self._xr()
        if self.kind == "v":
            return raw
        a, s = self._coefficients(x)
        n = (a**2 + s**2) ** 0.5
        # Without a division by alpha or sigma that can vanish: (a eps - s x0) / n from the one that is known.
        if self.kind == "x0":
            return (a * x / n - n * raw) / s
        if self.kind == "eps":
            return (n * raw - s * x / n) / a
        return (a * self.eps - s * self.x0) / n

    @property
    def flow(self) -> Tensor:
        """Rectified-flow velocity eps - x0 (B, ...)."""
        return self._xr()[1] if self.kind == "flow" else self.eps - self.x0

    @property
    def score(self) -> Tensor:
        """-eps / sigma (B, ...)."""
        eps = self.eps
        return -eps / broadcast(self.level.sigma, eps)

    def to(self, kind: str) -> Prediction:
        """The same prediction, with `raw` of another kind."""
        return self if kind == self.kind else Prediction(self.x, self.level, getattr(self, kind), kind, self.variance)

    def shifted(self, score: Tensor) -> Prediction:
        """The prediction after adding `score` (B, ...) to its score, for guidance.

        Where alpha is 0 the sample holds no signal and the shift of x0, v and flow is undefined: they stay as they are.
        """
        x, raw = self._xr()
        a, s = self._coefficients(x)
        c = score.to(raw)
        factor: Callable[[], Tensor | float] = {
            "eps": lambda: -s,
            "x0": lambda: s**2 / a,
            "v": lambda: -s * (a**2 + s**2) ** 0.5 / a,
            "flow": lambda: -s * (a + s) / a,
        }[self.kind]
        if isinstance(a, Tensor):
            shift = torch.where(a == 0, torch.zeros_like(a), torch.as_tensor(factor())) * c if self.kind != "eps" else factor() * c
        elif a == 0 and self.kind != "eps":
            return self
        else:
            shift = factor() * c
        return dataclasses.replace(self, raw=raw + shift)
