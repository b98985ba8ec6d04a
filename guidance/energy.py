"""EnergyGuidance: any differentiable log-potential U steers sampling.

The guided score is score + scale * c, where c approximates the gradient of U at the noisy sample x along one of three routes:

    direct             c = grad_x U(x)                  U understands noisy samples
    through_denoiser   c = J^T grad_x0 U(x0(x))         exact chain rule, J = d x0 / d x; a backward through the network
    x0_detached        c = j   grad_x0 U(x0)            no backward through the network

`x0_detached` replaces the Jacobian J by that of the optimal denoiser of Gaussian data with standard deviation sigma_data,

    j = alpha sigma_data^2 / (alpha^2 sigma_data^2 + sigma^2),

so that one scale means the same with every scheduler and at every noise level (the shift of x0 is the posterior variance times
the gradient; compare Song et al. 2023, PiGDM). Routes and names follow Bansal et al. 2023 (arXiv 2302.07121), Chung et al. 2023
(DPS, arXiv 2209.14687) and Ma et al. 2024 (EluCD).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from genkit.guidance.base import Guidance, State, differentiate
from genkit.levels import Level, broadcast
from genkit.prediction import Prediction

Energy = Callable[..., Tensor]
ROUTES = ("direct", "x0_detached", "through_denoiser")
SPACES = ("image", "latent")


class EnergyGuidance(Guidance):
    """Steer with an energy: a function of images (B, C, H, W) in [-1, 1] to log-potentials (B,), larger is better.

    Args:
        energy: called as `energy(images)`, or `energy(images, level)` if it takes two arguments. Each sample's value must
            depend on that sample alone.
        scale: weight of the gradient; 0 is off at no cost, 1 is Bayes' rule if U is a log-likelihood.
        route: "x0_detached" (default), "through_denoiser" or "direct".
        space: what the energy sees: "image" (decoded) or "latent" (the model's own variable). A pixel-space model has one space.
        sigma_data: standard deviation of the data in the model's variable, for `x0_detached`; by default 1 for latent models and
            0.5 for pixels (Karras et al. 2022, table 1).

    Raises:
        ValueError: an unknown route or space, a scale that is not finite, or an energy that does not return (B,).
        FloatingPointError: the energy or its gradient is NaN or infinite.

    Example:
        >>> redder = EnergyGuidance(lambda x: 50 * (x[:, 0] - x[:, 1:].mean(1)).mean((1, 2)))
        >>> pipe("a seven", guidance=redder)
    """

    name = "energy"

    def __init__(
        self,
        energy: Energy,
        scale: float = 1.0,
        route: str = "x0_detached",
        space: str = "image",
        *,
        sigma_data: float | None = None,
    ) -> None:
        if route not in ROUTES:
            raise ValueError(f"Unknown route {route!r}. Use one of: {', '.join(ROUTES)}.")
        if space not in SPACES:
            raise ValueError(f"Unknown space {space!r}. Use 'image' or 'latent'.")
        if scale != scale or scale in (float("inf"), float("-inf")):
            raise ValueError(f"scale={scale} is not finite.")
        self.energy, self.scale, self.route, self.space, self.sigma_data = energy, float(scale), route, space, sigma_data
        self.needs_graph = route == "through_denoiser"
        self._takes_level = _positional_count(energy) >= 2

    def active(self, state: State) -> bool:
        return self.scale != 0 and self.weight(state) != 0

    def weight(self, state: State) -> float:
        """Schedule on top of `scale`; 1 unless a subclass says otherwise."""
        return 1.0

    def gradient(self, state: State, prediction: Prediction) -> Tensor:
        """The bare gradient of the route (B, ...): with respect to x, or to x0 for `x0_detached`."""
        if self.route == "through_denoiser":
            with torch.inference_mode(False), torch.enable_grad():
                value = self._evaluate(prediction.x0, state)
                (gradient,) = torch.autograd.grad(value.sum(), prediction.x)
            value = value.detach()
        else:
            point = prediction.x if self.route == "direct" else prediction.x0
            value, gradient = differentiate(lambda z: self._evaluate(z, state), point)
        if not (torch.isfinite(value).all() and torch.isfinite(gradient).all()):
            raise FloatingPointError(
                f"Guidance {self.name!r} gave NaN or infinity at evaluation {state.level.index + 1} of {len(state.levels)} "
                f"(timestep {state.level.t:g}). Check the energy, or lower its scale."
            )
        state.log[self.name] = value
        return gradient

    def shift(self, state: State, prediction: Prediction) -> Tensor | None:
        c = self.gradient(state, prediction)
        if self.route == "x0_detached":
            c = broadcast(self.jacobian(state.level, state.codec is not None), c) * c
        return self.scale * self.weight(state) * c

    def jacobian(self, level: Level, latent: bool) -> float | Tensor:
        """j, the stand-in for d x0 / d x (see above)."""
        sigma_data = self.sigma_data if self.sigma_data is not None else (1.0 if latent else 0.5)
        variance = sigma_data**2
        return level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)

    def _evaluate(self, z: Tensor, state: State) -> Tensor:
        images = state.decode(z) if self.space == "image" else z
        value = self.energy(images, state.level) if self._takes_level else self.energy(images)
        if not isinstance(value, Tensor) or value.shape != (len(z),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The energy must return one value for each of the {len(z)} samples, shape ({len(z)},); got {got}.")
        return value


def _positional_count(function: Callable[..., Tensor]) -> int:
    """How many positional arguments without a default a callable takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
