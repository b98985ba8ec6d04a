"""The guidance protocol: three sites, composition, schedules.

At every network evaluation the sampler asks, in this order,

    state.x = guidance.before(state)           site X: displace the sample before the denoiser
    pred    = guidance(state, predict)         site S: shift the prediction (score += c); the usual one
    x_next  = guidance.after(state, x_next)    site M: displace the sample after the scheduler's step from state.x with pred

Each is the identity unless overridden. `predict(grad=False)` evaluates the network at `state.x`, so a guidance decides how often,
and whether a graph is kept. The step is taken from `state.x` as the guidance leaves it: a guidance that replaces it (recurrence
does) must return the prediction at the new one.

Guidances compose: `a + b` adds shifts that all come from the same unguided prediction (so order does not matter), `2.0 * a` weighs,
`a.between(0.2, 0.8)` gates. A composition is a list of weighted parts, its `terms`; those that have an energy and a gradient route
in common are evaluated together. Weight 0 is bit-identical to no guidance and costs nothing, sample by sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genkit.guidance import schedules
from genkit.guidance.schedules import Schedule, Weight, checked, is_off, multiply, weighted
from genkit.guidance.shared import sharing
from genkit.guidance.state import Predict, State
from genkit.prediction import Prediction


class Term(NamedTuple):
    """A part of a composition at one evaluation: the product of the schedules around it, the guidance, and its name for reports."""

    weight: Weight
    guidance: Guidance
    name: str


class Guidance:
    """Base of all guidance; does nothing. Override `before`, `shift` or `__call__`, and `after`."""

    name = "guidance"
    needs_graph = False  # whether `shift` differentiates through the denoiser
    outermost = False  # whether it drives the network itself, and so cannot be a part of another

    def wants_graph(self, state: State) -> bool:
        """Whether the prediction must keep a graph at this evaluation."""
        return self.needs_graph and self.active(state)

    def active(self, state: State) -> bool:
        """Whether this guidance does anything at this evaluation; inactive costs nothing."""
        return True

    def own_weight(self, state: State) -> Weight:
        """The weight, a number or (B,), that `shift` applies itself; samples of weight 0 are not guided."""
        return 1.0

    def check(self, pipe: Any) -> None:
        """Asked before a run: refuse a diffusers pipeline that this guidance does not fit.

        Raises:
            ValueError: what does not fit, and what to do.
        """

    def leaves(self) -> list[Guidance]:
        """The guidances that this one is composed of."""
        return [self]

    def terms(self, state: State) -> list[Term]:
        """The weighted parts that do something at this evaluation."""
        return [Term(1.0, self, self.name)] if self.active(state) else []

    def before(self, state: State) -> Tensor:
        """Site X: the sample to denoise (B, ...)."""
        return state.x

    def shift(self, state: State, prediction: Prediction) -> Tensor | None:
        """Site S: what to add to the score, (B, ...) in the scheduler's own variable, or None."""
        return None

    def __call__(self, state: State, predict: Predict) -> Prediction:
        """The guided prediction at `state.x`; a guidance that replaces `state.x` returns the prediction there."""
        names = _names(self.leaves())
        terms = [term._replace(name=names[id(term.guidance)]) for term in self.terms(state)]
        if not terms:
            return predict()
        graph = any(term.guidance.wants_graph(state) for term in terms)
        prediction = predict(grad=graph)
        c = _contribution(terms, state, prediction, predict)
        if graph:
            prediction = dataclasses.replace(prediction, x=prediction.x.detach(), raw=prediction.raw.detach())
        return prediction if c is None else prediction.shifted(c)

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

    def joint(self, state: State) -> Hashable | None:
        """What this guidance can be evaluated together with: all that have the same value here, by `joint_shift`; None: alone."""
        return None

    def joint_shift(self, state: State, prediction: Prediction, terms: list[Term]) -> Tensor:
        """What the terms, all with the `joint` of this guidance, add to the score (B, ...)."""
        raise NotImplementedError

    def after(self, state: State, x_next: Tensor) -> Tensor:
        """Site M: the sample after the step (B, ...)."""
        return x_next

    def __add__(self, other: Guidance | Callable[..., Tensor]) -> Guidance:
        from genkit.guidance.energy import as_guidance

        return Sum([*_parts(self), *_parts(as_guidance(other))])

    def __radd__(self, other: Callable[..., Tensor]) -> Guidance:
        from genkit.guidance.energy import as_guidance

        return Sum([*_parts(as_guidance(other)), *_parts(self)])

    def __mul__(self, weight: float) -> Guidance:
        value = float(weight)
        return Scheduled(self, lambda state: value)

    __rmul__ = __mul__

    def between(self, start: float, stop: float) -> Guidance:
        """Only while `start <= progress <= stop`, fractions of the run.

        Raises:
            ValueError: not 0 <= start <= stop <= 1.
        """
        return Scheduled(self, schedules.between(start, stop))

    def within(self, low: float, high: float) -> Guidance:
        """Only while the noise-to-signal ratio sigma/alpha is from `low` to `high`, sample by sample.

        Raises:
            ValueError: not 0 <= low <= high.
        """
        return Scheduled(self, schedules.within(low, high))

    def scheduled(self, schedule: Schedule) -> Guidance:
        """Weighted by a function of the state: a number, or one for each sample (B,). See `genkit.guidance.schedules`.

        The function is asked several times at an evaluation and must give the same answer.
        """
        return Scheduled(self, schedule)

    def recurrent(self, times: int, start: float = 0.0, stop: float = 1.0) -> Guidance:
        """Each evaluation `times` times, re-noised in between: see `genkit.guidance.Recurrent`."""
        from genkit.guidance.recurrence import Recurrent

        return Recurrent(self, times, start, stop)


class Composite(Guidance):
    """A guidance made of others: what it does at site S are its terms."""

    def active(self, state: State) -> bool:
        return bool(self.terms(state))

    def wants_graph(self, state: State) -> bool:
        return any(term.guidance.wants_graph(state) for term in self.terms(state))

    def contribution(self, state: State, prediction: Prediction, predict: Predict) -> Tensor | None:
        return _contribution(self.terms(state), state, prediction, predict)


class Scheduled(Composite):
    """A guidance times a weight that may depend on the state: every displacement and shift is multiplied by it."""

    def __init__(self, guidance: Guidance, schedule: Schedule) -> None:
        _refuse_outermost(guidance)
        self.guidance, self.schedule, self.name = guidance, schedule, guidance.name

    def weight(self, state: State) -> Weight:
        """The schedule's value: a float, or a tensor (B,).

        Raises:
            ValueError: the schedule returned something else, or infinity.
        """
        return checked(self.schedule(state), len(state.x), self.name)

    def leaves(self) -> list[Guidance]:
        return self.guidance.leaves()

    def terms(self, state: State) -> list[Term]:
        weight = self.weight(state)
        if is_off(weight):
            return []
        inner = [term._replace(weight=multiply(weight, term.weight)) for term in self.guidance.terms(state)]
        return [term for term in inner if not is_off(term.weight)]

    def before(self, state: State) -> Tensor:
        weight = self.weight(state)
        return state.x if is_off(weight) else _mix(state.x, self.guidance.before(state), weight)

    def after(self, state: State, x_next: Tensor) -> Tensor:
        weight = self.weight(state)
        return x_next if is_off(weight) else _mix(x_next, self.guidance.after(state, x_next), weight)


class Sum(Composite):
    """Several guidances at once; displacements and shifts add, each computed from the same unguided sample and prediction."""

    def __init__(self, parts: list[Guidance]) -> None:
        for part in parts:
            _refuse_outermost(part)
        self.parts = parts
        self.name = " + ".join(p.name for p in parts)

    def leaves(self) -> list[Guidance]:
        return [leaf for part in self.parts for leaf in part.leaves()]

    def terms(self, state: State) -> list[Term]:
        return [term for part in self.parts for term in part.terms(state)]

    def before(self, state: State) -> Tensor:
        return _sum_displacements(state.x, [p.before(state) for p in self.parts])

    def after(self, state: State, x_next: Tensor) -> Tensor:
        return _sum_displacements(x_next, [p.after(state, x_next) for p in self.parts])


def differentiate(energy: Callable[[Tensor], Tensor], x: Tensor, *, copy: bool = True) -> tuple[Tensor, Tensor]:
    """(energy (B,), gradient (B, ...)) of a per-sample energy at x; sums over the batch, so samples do not mix.

    Works under `no_grad` and under `inference_mode`: the graph is built on a copy of x. With `copy=False` x itself is the leaf of
    the energy's graph, and that graph stays for others.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True) if copy else x
        with sharing():
            value = energy(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, retain_graph=not copy)
    return value.detach(), gradient


def _contribution(terms: list[Term], state: State, prediction: Prediction, predict: Predict) -> Tensor | None:
    """The sum of what the terms add to the score; terms of one `joint` are evaluated together."""
    together: dict[Hashable, list[Term]] = {}
    shifts = []
    for term in terms:
        if (together_with := term.guidance.joint(state)) is not None:
            together.setdefault(together_with, []).append(term)
        elif (c := term.guidance.contribution(state, prediction, predict)) is not None:
            shifts.append(weighted(term.weight, c))
    shifts += [group[0].guidance.joint_shift(state, prediction, group) for group in together.values()]
    return sum(shifts[1:], shifts[0]) if shifts else None


def _names(leaves: list[Guidance]) -> dict[int, str]:
    """A name for each guidance of a composition, by its identity: "energy", the second of that name "energy#2"."""
    names: dict[int, str] = {}
    counts: dict[str, int] = {}
    for leaf in leaves:
        if id(leaf) not in names:
            count = counts[leaf.name] = counts.get(leaf.name, 0) + 1
            names[id(leaf)] = leaf.name if count == 1 else f"{leaf.name}#{count}"
    return names


def _parts(guidance: Guidance) -> list[Guidance]:
    return guidance.parts if isinstance(guidance, Sum) else [guidance]


def _refuse_outermost(guidance: Guidance) -> None:
    if guidance.outermost:
        raise ValueError(
            f"Recurrence of {guidance.name!r} cannot be a part of another guidance. "
            "Compose first, then repeat: (a + b).recurrent(2)."
        )


def _mix(x: Tensor, moved: Tensor, weight: Weight) -> Tensor:
    if moved is x or (not isinstance(weight, Tensor) and weight == 1):
        return moved
    return x + weighted(weight, moved - x)


def _sum_displacements(x: Tensor, moved: list[Tensor]) -> Tensor:
    moved = [m for m in moved if m is not x]
    if len(moved) < 2:
        return moved[0] if moved else x
    return x + sum((m - x for m in moved[1:]), moved[0] - x)
