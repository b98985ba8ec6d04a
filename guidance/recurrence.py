"""Recurrence: every evaluation several times, with fresh noise in between, so that guidance and denoiser settle on each other.

Within one evaluation at the level (a, s), whose step leads to the level (a', s'):

    x' = step(x, guided prediction at x)
    x  = (a / a') x' + sqrt(s^2 - (a / a')^2 s'^2) eps,        eps ~ N(0, I)

and again. If x' = a' x0 + s' eps', then x = a x0 + s eps'' exactly, with VP, VE and flow levels alike. (Universal Guidance: Bansal
et al. 2023, arXiv 2302.07121, algorithm 1, k times; "time travel" of FreeDoM: Yu et al. 2023, arXiv 2303.09833; RePaint: Lugmayr
et al. 2022, arXiv 2201.09865.)

The extra steps are taken by a copy of the scheduler, so its history has one entry for each level. A second-order scheduler repeats
the first stage of its steps. Schedulers that extrapolate from differences of earlier predictions take a first-order step from the
new sample, since its noise is not that of the predictions before. (With the history left as it is, Gaussian data of standard
deviation 0.5 come out of 40 steps of DPM++ 2M, three times each, with 0.57, and with 1.9 where its last sigma is not zero; like
this with 0.45 and 0.48.)
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit import _host, noise
from genkit.guidance.base import Guidance, Predict, State
from genkit.guidance.schedules import between, multiply, noise_to_signal
from genkit.levels import Level, broadcast
from genkit.prediction import Prediction
from genkit.sampling import step


class Recurrent(Guidance):
    """Evaluate a guidance `times` times at each level, re-noised in between. Costs `times` network evaluations where it repeats.

    Args:
        guidance: what is repeated; recurrence itself must be outermost, so compose first: `(a + b).recurrent(2)`.
        times: evaluations at a level; 1 is no recurrence. Universal Guidance uses up to 10.
        start, stop: repeat only while start <= progress <= stop; FreeDoM does so in the middle of the run.

    Samples that the guidance leaves alone (weight 0) are not re-noised. The noise is a function of each sample's seed, or comes
    from torch's global generator where there are no seeds. With DPM++, UniPC, DEIS and SA the step after a repetition is of first
    order, for the whole batch.

    Raises:
        ValueError: `times` is below 1, not 0 <= start <= stop <= 1, a guidance that is a recurrence itself, or a run that is
            differentiated.

    Example:
        >>> pipe("", guidance=ClassifierGuidance(classifier, "seven").recurrent(4, 0.2, 0.7))
    """

    outermost = True

    def __init__(self, guidance: Guidance, times: int, start: float = 0.0, stop: float = 1.0) -> None:
        if not isinstance(times, int) or isinstance(times, bool) or times < 1:
            raise ValueError(f"recurrence times={times!r} must be a whole number of at least 1; 1 is no recurrence.")
        if guidance.outermost:
            raise ValueError(f"{guidance.name!r} is recurrent already. Multiply the times instead.")
        self.guidance, self.times, self.name = guidance, times, guidance.name
        self._window = between(start, stop)

    def active(self, state: State) -> bool:
        return self.guidance.active(state)

    def wants_graph(self, state: State) -> bool:
        return self.guidance.wants_graph(state)

    def leaves(self) -> list[Guidance]:
        return self.guidance.leaves()

    def before(self, state: State) -> Tensor:
        return self.guidance.before(state)

    def __call__(self, state: State, predict: Predict) -> Prediction:
        repeats = self.times - 1 if self._window(state) and _descends(state) else 0
        if repeats and state.x.requires_grad:
            raise ValueError(f"Recurrence of {self.name!r} cannot be differentiated. Sample under torch.no_grad().")
        generators = _generators(state)
        prediction = self.guidance(state, predict)
        for _ in range(repeats):
            rows = guided_samples(self.guidance, state)
            if not rows.any():
                break
            x_next = step(copy.deepcopy(state.scheduler), state.level, prediction, state.x, generator=generators)
            x_next = self.guidance.after(state, x_next)
            x = state.x
            state.x = _where(rows, renoise(x_next, _following(state), state.level, generators), x)
            state.x = _where(rows, self.guidance.before(state), x)
            _host.forget_history(state.scheduler)
            prediction = _select(rows, self.guidance(state, predict), prediction, state.x)
        return prediction

    def after(self, state: State, x_next: Tensor) -> Tensor:
        return self.guidance.after(state, x_next)


def renoise(
    x_next: Tensor, following: Level, level: Level, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """A sample at `level` from one at the less noisy level `following`: (a/a') x' + sqrt(s^2 - (a/a')^2 s'^2) eps."""
    ratio = level.alpha / following.alpha
    variance = level.sigma**2 - (ratio * following.sigma) ** 2
    std = variance.clamp_min(0).sqrt() if isinstance(variance, Tensor) else math.sqrt(max(0.0, variance))
    eps = randn_tensor(x_next.shape, generator=generator, device=x_next.device, dtype=x_next.dtype)
    return broadcast(ratio, x_next) * x_next + broadcast(std, x_next) * eps


def guided_samples(guidance: Guidance, state: State) -> Tensor:
    """Which samples (B,) the guidance acts on at this evaluation."""
    rows = torch.zeros(len(state.x), dtype=torch.bool, device=state.x.device)
    for term in guidance.terms(state):
        rows |= torch.as_tensor(multiply(term.weight, term.guidance.own_weight(state)), device=rows.device) != 0
    return rows


def _descends(state: State) -> bool:
    """Whether the step from here starts a new level that is less noisy than this one."""
    if not _host.starts_step(state.scheduler, state.level.index):
        return False
    return bool(noise_to_signal(_following(state)) < noise_to_signal(state.level))


def _following(state: State) -> Level:
    """The level that the next step leads to."""
    later = state.levels[state.level.index + 1 :]
    return later[0] if later else Level(*_host.final_alpha_sigma(state.scheduler), 0)


def _generators(state: State) -> list[torch.Generator] | None:
    """A generator for each sample, of its seed and this evaluation."""
    if state.seeds is None:
        return None
    return noise.generators([noise.mix(seed, noise.GUIDANCE) for seed in state.seeds], state.level.index)


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (old.ndim - 1)), new, old)


def _select(rows: Tensor, new: Prediction, old: Prediction, x: Tensor) -> Prediction:
    """The new prediction for some samples, the old one for the others; x is where each was made."""
    variance = None if new.variance is None or old.variance is None else _where(rows, new.variance, old.variance)
    return dataclasses.replace(new, x=x, raw=_where(rows, new.raw, old.raw), variance=variance)
