"""The guidance protocol: three sites, composition, schedules.

At every network evaluation the sampler asks, in this order,

    x      = guidance.before(state)            site X: displace the sample before the denoiser
    pred   = guidance(state, predict)          site S: shift the prediction (score += c); the usual one
    x_next = guidance.after(state, x_next)     site M: displace the sample after the scheduler's step

Each is the identity unless overridden. `predict(grad=False)` evaluates the network at `state.x`, so a guidance decides how often,
and whether a graph is kept. Guidances compose: `a + b` adds shifts that all come from the same unguided prediction (so order
does not matter), `2.0 * a` weighs, `a.between(0.2, 0.8)` gates. Weight 0 is bit-identical to no guidance and costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from genkit.levels import Level
from genkit.prediction import Prediction


class Predict(Protocol):
    """Evaluates the network at `state.x`; with `grad=True` the prediction keeps a graph to `prediction.x`, a leaf."""

    def __call__(self, *, grad: bool = False) -> Prediction: ...


@dataclasses.dataclass
class State:
    """What a guidance sees.

    Args:
        x: samples (B, ...) in the scheduler's own variable, about to be denoised.
        level: their noise level; `level.index` counts network evaluations, `level.order` is 2 in a corrector stage.
        levels: all levels of the run.
        cond: conditioning of the batch, or None.
        codec: latent codec, or None for a pixel-space model.
        seeds: seed of each sample, or None; for counter-based noise.
        scheduler: the scheduler, for reading.
        cache: scratch space shared by the guidances of a run, emptied at its start.
        log: figures worth reporting (a guidance's energy, ...), by name, for this evaluation.
    """

    x: Tensor
    level: Level
    levels: list[Level]
    cond: Any = None
    codec: Any = None
    seeds: list[int] | None = None
    scheduler: Any = None
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)
    log: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def decode(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of clean samples; a pixel-space model's samples are images."""
        return x0 if self.codec is None else self.codec.decode(x0)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done before this evaluation, 0 to 1 (0 first, 1 last)."""
        return self.level.index / max(1, len(self.levels) - 1)


class Guidance:
    """Base of all guidance; does nothing. Override `before`, `shift` or `__call__`, and `after`."""

    name = "guidance"
    needs_graph = False  # whether `shift` differentiates through the denoiser

    def wants_graph(self, state: State) -> bool:
        """Whether the prediction must keep a graph at this evaluation."""
        return self.needs_graph and self.active(state)

    def active(self, state: State) -> bool:
        """Whether this guidance does anything at this evaluation; inactive costs nothing."""
        return True

    def before(self, state: State) -> Tensor:
        """Site X: the sample to denoise (B, ...)."""
        return state.x

    def shift(self, state: State, prediction: Prediction) -> Tensor | None:
        """Site S: what to add to the score, (B, ...) in the scheduler's own variable, or None."""
        return None

    def __call__(self, state: State, predict: Predict) -> Prediction:
        """The guided prediction at `state.x`."""
        return _shifted_once(self, state, predict)

    def contribution(self, state: State, prediction: Prediction, predict: Predict) -> Tensor | None:
        """What this guidance adds to the score of `prediction`, as a part of a composition.

        A guidance that overrides `__call__` contributes the difference it makes to the score; its first plain evaluation is
        `prediction`, which all parts share.
        """
        if type(self).__call__ is Guidance.__call__:
            return self.shift(state, prediction)
        shared = [prediction]

        def first_is_shared(*, grad: bool = False) -> Prediction:
            return shared.pop() if shared and not grad else predict(grad=grad)

        return self(state, first_is_shared).score - prediction.score

    def after(self, state: State, x_next: Tensor) -> Tensor:
        """Site M: the sample after the step (B, ...)."""
        return x_next

    def __add__(self, other: Guidance) -> Guidance:
        return Sum(_parts(self) + _parts(other))

    def __mul__(self, weight: float) -> Guidance:
        return Scheduled(self, constant(weight))

    __rmul__ = __mul__

    def between(self, start: float, stop: float) -> Guidance:
        """Only while `start <= progress <= stop`, fractions of the run.

        Raises:
            ValueError: not 0 <= start <= stop <= 1.
        """
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"between({start}, {stop}) is no interval in 0 to 1.")
        return Scheduled(self, lambda state: float(start <= state.progress <= stop))

    def scheduled(self, weight: Callable[[State], float]) -> Guidance:
        """Weighted by a function of the state."""
        return Scheduled(self, weight)


def constant(weight: float) -> Callable[[State], float]:
    """A schedule that does not change."""
    value = float(weight)
    return lambda state: value


class Scheduled(Guidance):
    """A guidance times a weight that may depend on the state: every displacement and shift is multiplied by it."""

    def __init__(self, guidance: Guidance, weight: Callable[[State], float]) -> None:
        self.guidance, self.weight, self.name = guidance, weight, guidance.name

    def active(self, state: State) -> bool:
        return self.weight(state) != 0 and self.guidance.active(state)

    def before(self, state: State) -> Tensor:
        if not self.active(state):
            return state.x
        return _mix(state.x, self.guidance.before(state), self.weight(state))

    def __call__(self, state: State, predict: Predict) -> Prediction:
        return _shifted_once(self, state, predict)

    def wants_graph(self, state: State) -> bool:
        return self.active(state) and self.guidance.wants_graph(state)

    def contribution(self, state: State, prediction: Prediction, predict: Predict) -> Tensor | None:
        c = self.guidance.contribution(state, prediction, predict)
        return None if c is None else self.weight(state) * c

    def after(self, state: State, x_next: Tensor) -> Tensor:
        if not self.active(state):
            return x_next
        return _mix(x_next, self.guidance.after(state, x_next), self.weight(state))


class Sum(Guidance):
    """Several guidances at once; displacements and shifts add, each computed from the same unguided sample and prediction."""

    def __init__(self, parts: list[Guidance]) -> None:
        self.parts = parts
        self.name = " + ".join(p.name for p in parts)

    def active(self, state: State) -> bool:
        return any(p.active(state) for p in self.parts)

    def before(self, state: State) -> Tensor:
        return _sum_displacements(state.x, [p.before(state) for p in self.parts])

    def __call__(self, state: State, predict: Predict) -> Prediction:
        return _shifted_once(self, state, predict)

    def wants_graph(self, state: State) -> bool:
        return any(p.wants_graph(state) for p in self.parts)

    def contribution(self, state: State, prediction: Prediction, predict: Predict) -> Tensor | None:
        active = [p for p in self.parts if p.active(state)]
        shifts = [c for p in active if (c := p.contribution(state, prediction, predict)) is not None]
        return sum(shifts[1:], shifts[0]) if shifts else None

    def after(self, state: State, x_next: Tensor) -> Tensor:
        return _sum_displacements(x_next, [p.after(state, x_next) for p in self.parts])


def _shifted_once(guidance: Guidance, state: State, predict: Predict) -> Prediction:
    """One evaluation of the network, shifted by the whole contribution of a composition."""
    if not guidance.active(state):
        return predict()
    graph = guidance.wants_graph(state)
    prediction = predict(grad=graph)
    c = guidance.contribution(state, prediction, predict)
    prediction = _detached(prediction) if graph else prediction
    return prediction if c is None else prediction.shifted(c)


def _parts(guidance: Guidance) -> list[Guidance]:
    return guidance.parts if isinstance(guidance, Sum) else [guidance]


def _mix(x: Tensor, moved: Tensor, weight: float) -> Tensor:
    return moved if weight == 1 or moved is x else x + weight * (moved - x)


def _sum_displacements(x: Tensor, moved: list[Tensor]) -> Tensor:
    moved = [m for m in moved if m is not x]
    if len(moved) < 2:
        return moved[0] if moved else x
    return x + sum((m - x for m in moved[1:]), moved[0] - x)


def _detached(prediction: Prediction) -> Prediction:
    return dataclasses.replace(prediction, x=prediction.x.detach(), raw=prediction.raw.detach())


def differentiate(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(energy (B,), gradient (B, ...)) of a per-sample energy at x; sums over the batch, so samples do not mix.

    Works under `no_grad` and under `inference_mode`: the graph is built on a copy of x.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        value = energy(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
