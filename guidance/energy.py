"""EnergyGuidance: any differentiable log-potential U steers sampling.

The guided score is score + scale * c, where c approximates the gradient of U at the noisy sample x along one of three routes:

    direct             c = grad_x U(x)                  U understands noisy samples
    through_denoiser   c = J^T grad_x0 U(x0(x))         exact chain rule, J = d x0 / d x; a backward through the network
    x0_detached        c = j   grad_x0 U(x0)            no backward through the network

`x0_detached` replaces the Jacobian J by that of the optimal denoiser of Gaussian data with standard deviation sigma_data,

    j = alpha sigma_data^2 / (alpha^2 sigma_data^2 + sigma^2),

so that one scale means the same with every scheduler and at every noise level (the shift of x0 is the posterior variance times
the gradient; compare Song et al. 2023, PiGDM). Energies U_i of one route that are summed share one point and one backward pass:

    c = W grad sum_i (W_i / W) U_i,     W_i = weight_i scale_i (j_i for `x0_detached`),  W = max_i |W_i| of each sample

(divided by W, so that no weight runs through a half-precision backward pass; one energy alone is differentiated as it is).

Routes and names follow Bansal et al. 2023 (arXiv 2302.07121), Chung et al. 2023 (DPS, arXiv 2209.14687) and Ma et al. 2024 (EluCD).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from genkit.guidance.base import Guidance, State, Term, differentiate
from genkit.guidance.schedules import Weight, checked, is_off, multiply, weighted
from genkit.levels import Level
from genkit.prediction import Prediction

Energy = Callable[..., Tensor]
ROUTES = ("direct", "x0_detached", "through_denoiser")
SPACES = ("image", "latent")


class EnergyGuidance(Guidance):
    """Steer with an energy: a function of images (B, C, H, W) in [-1, 1] to log-potentials (B,), larger is better.

    Args:
        energy: called as `energy(images)`, or `energy(images, level)` if it takes two arguments or one called `level`. A
            keyword-only argument `seeds` gets the seed of each sample (or None), for counter-based noise. Each sample's value must
            depend on that sample alone.
        scale: weight of the gradient; 0 is off at no cost, 1 is Bayes' rule if U is a log-likelihood.
        route: "x0_detached" (default), "through_denoiser" or "direct".
        space: what the energy sees: "image" (decoded) or "latent" (the model's own variable). A pixel-space model has one space.
            Of a video, images are its frames one by one, whose energies are averaged; latents are (B, C, T, h, w).
        sigma_data: standard deviation of the data in the model's variable, for `x0_detached`; by default 1 for latent models and
            0.5 for pixels (Karras et al. 2022, table 1).
        name: what reports and errors call it.

    Subclasses usually override `weight`. One that overrides `gradient`, `shift`, `contribution` or `__call__` is evaluated on its
    own; all others of a route are evaluated together.

    Raises:
        ValueError: an unknown route or space, a scale that is not finite, or an energy that does not return (B,) or does not depend
            on what it is given.
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
        name: str | None = None,
    ) -> None:
        if route not in ROUTES:
            raise ValueError(f"Unknown route {route!r}. Use one of: {', '.join(ROUTES)}.")
        if space not in SPACES:
            raise ValueError(f"Unknown space {space!r}. Use 'image' or 'latent'.")
        if scale != scale or scale in (float("inf"), float("-inf")):
            raise ValueError(f"scale={scale} is not finite.")
        self.energy, self.scale, self.route, self.space, self.sigma_data = energy, float(scale), route, space, sigma_data
        self.name = name or self.name
        self.needs_graph = route == "through_denoiser"
        self._takes_level, self._takes_seeds = _arguments(energy)

    def check(self, pipe: Any) -> None:
        device = getattr(pipe, "device", None)
        held = (*vars(self).values(), *getattr(self.energy, "__dict__", {}).values(), self.energy)
        for network in dict.fromkeys(value for value in held if isinstance(value, nn.Module)):
            weight = next(network.parameters(), None)
            if device is not None and weight is not None and weight.device.type != device.type:
                raise ValueError(
                    f"The {type(network).__name__} of guidance {self.name!r} is on {weight.device}, but the pipeline is on "
                    f"{device}. Move it there with .to({str(device)!r})."
                )

    def active(self, state: State) -> bool:
        return self.scale != 0 and not is_off(self.own_weight(state))

    def weight(self, state: State) -> Weight:
        """Schedule on top of `scale`, a number or one for each sample (B,); 1 unless a subclass says otherwise."""
        return 1.0

    def own_weight(self, state: State) -> Weight:
        """scale * weight."""
        return self.scale * checked(self.weight(state), len(state.x), self.name)

    def gradient(self, state: State, prediction: Prediction) -> Tensor:
        """The bare gradient of the route (B, ...): with respect to x, or to x0 for `x0_detached`."""
        return _gradient(state, prediction, [self._term()], torch.ones(1, len(state.x), device=state.x.device))

    def shift(self, state: State, prediction: Prediction) -> Tensor | None:
        c = self.gradient(state, prediction)
        return weighted(self._whole_weight(state, self._term()), c)

    def joint(self, state: State) -> Hashable | None:
        """The route: energies that are differentiated at the same point go together."""
        own = {name: getattr(type(self), name) for name in ("gradient", "shift", "contribution", "__call__")}
        return self.route if all(own[name] is getattr(EnergyGuidance, name) for name in own) else None

    def joint_shift(self, state: State, prediction: Prediction, terms: list[Term]) -> Tensor:
        weights = [_of(term)._whole_weight(state, term) for term in terms]
        x = state.x
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows = torch.stack([torch.as_tensor(w, dtype=dtype, device=x.device).expand(len(x)) for w in weights])
        largest = rows.abs().amax(0)
        relative = torch.where(largest > 0, rows / largest, torch.zeros_like(rows))
        return weighted(largest, _gradient(state, prediction, terms, relative))

    def jacobian(self, level: Level, latent: bool) -> float | Tensor:
        """j, the stand-in for d x0 / d x (see above)."""
        sigma_data = self.sigma_data if self.sigma_data is not None else (1.0 if latent else 0.5)
        variance = sigma_data**2
        return level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)

    def _term(self) -> Term:
        return Term(1.0, self, self.name)

    def _whole_weight(self, state: State, term: Term) -> Weight:
        """Everything that multiplies this energy's gradient."""
        weight = multiply(term.weight, self.own_weight(state))
        return weight if self.route != "x0_detached" else multiply(weight, self.jacobian(state.level, state.codec is not None))

    def _value(self, z: Tensor, state: State) -> Tensor:
        """U (B,) of images or latents z, checked."""
        if self.space == "image" and z.ndim == 5:
            return torch.stack([self._value(frame, state) for frame in z.unbind(2)]).mean(0)
        value = self._call(z, state)
        if not isinstance(value, Tensor) or value.shape != (len(z),):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"Guidance {self.name!r} must return one value for each of the {len(z)} samples, shape ({len(z)},); got {got} at "
                f"{when(state)}."
            )
        if not value.requires_grad:
            raise ValueError(
                f"Guidance {self.name!r} returned at {when(state)} what does not depend on the samples in a differentiable way. "
                "Compute it with torch operations, without detach or no_grad."
            )
        return value

    def _call(self, z: Tensor, state: State) -> Tensor:
        """The energy with the arguments that it takes."""
        arguments = (z, state.level) if self._takes_level else (z,)
        return self.energy(*arguments, **({"seeds": state.seeds} if self._takes_seeds else {}))


def as_guidance(guidance: Guidance | Energy) -> Guidance:
    """A guidance as it is; a function of images (B, 3, H, W) in [-1, 1] that returns (B,) as an `EnergyGuidance` of its name.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(guidance, Guidance):
        return guidance
    if not callable(guidance) or isinstance(guidance, type):
        raise ValueError(
            f"{guidance!r:.100} is no guidance. Give a Guidance, or a function of images that returns one value for each."
        )
    return EnergyGuidance(guidance, name=getattr(guidance, "__name__", None))


def _gradient(state: State, prediction: Prediction, terms: list[Term], relative: Tensor) -> Tensor:
    """Gradient (B, ...) of sum_i relative_i U_i at the point of the terms' route; notes the log-potentials.

    Args:
        relative: (n, B), a weight for each of the n terms and each sample; where it is 0 the value does not matter.
    """
    values, gradient = _differentiate(state, prediction, terms, relative)
    if not _finite(values, gradient, relative):
        alone = [([term], row[None]) for term, row in zip(terms, relative, strict=True)]
        bad = [one[0] for one, row in alone if not _finite(*_differentiate(state, prediction, one, row), row)]
        names = " and ".join(repr(term.name) for term in bad or terms)
        raise FloatingPointError(f"Guidance {names} gave NaN or infinity at {when(state)}. Check the energy, or lower its scale.")
    for term, value, row in zip(terms, values, relative, strict=True):
        before = state.energy.get(term.name, torch.full_like(value, float("nan")))
        state.log[term.name] = state.energy[term.name] = torch.where(row != 0, value, before)
    return gradient


def _differentiate(state: State, prediction: Prediction, terms: list[Term], relative: Tensor) -> tuple[list[Tensor], Tensor]:
    """The values U_i (B,) of the terms, and the gradient of their weighted sum: one decoding, one backward pass."""
    energies = [_of(term) for term in terms]
    values: list[Tensor] = []

    def total(z: Tensor) -> Tensor:
        decoded = any(energy.space == "image" for energy in energies)
        spaces = {"latent": z, "image": state.decode(z) if decoded else z}
        values[:] = [energy._value(spaces[energy.space], state) for energy in energies]
        rows = relative.clone()  # a tensor made in inference mode cannot be part of a graph
        parts = [torch.where(row != 0, row.to(u) * u, 0) for row, u in zip(rows, values, strict=True)]
        return sum(parts[1:], parts[0])

    route = energies[0].route
    if route == "through_denoiser":
        _, gradient = differentiate(lambda x: total(prediction.x0), prediction.x, copy=False)
    else:
        _, gradient = differentiate(total, prediction.x if route == "direct" else prediction.x0)
    return [value.detach() for value in values], gradient


def _finite(values: list[Tensor], gradient: Tensor, relative: Tensor) -> bool:
    """Whether values and gradient are finite wherever a sample is guided."""
    on = relative != 0
    good = torch.isfinite(gradient).flatten(1).all(1) | ~on.any(0)
    return bool(good.all() and all((torch.isfinite(u) | ~row).all() for u, row in zip(values, on, strict=True)))


def _of(term: Term) -> EnergyGuidance:
    assert isinstance(term.guidance, EnergyGuidance)
    return term.guidance


def when(state: State) -> str:
    """Which evaluation this is, for messages."""
    return f"evaluation {state.level.index + 1} of {len(state.levels)} (timestep {state.level.t:g})"


def _arguments(function: Callable[..., Tensor]) -> tuple[bool, bool]:
    """Whether a callable takes a level (a parameter of that name, or a second one it needs), and a keyword-only `seeds`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False, False
    positional = [p for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    seeds = parameters.get("seeds")
    return "level" in parameters or len(positional) >= 2, seeds is not None and seeds.kind is seeds.KEYWORD_ONLY
