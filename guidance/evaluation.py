"""One evaluation of a network that another program ran: what `attach` and `as_guider` share.

The host has the model output and the sample; its scheduler says at which level they are. From these comes a `Prediction`, a
guidance shifts it, and `genkit.sampling.model_output` makes it again what the host's scheduler expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genkit import _host
from genkit.guidance.base import Guidance, State
from genkit.levels import Level, broadcast, kind_of
from genkit.prediction import Prediction
from genkit.sampling import _require_finite, model_output


def require_family(scheduler: Any) -> None:
    """Refuse a scheduler that `levels_of` does not know, before it has any timesteps."""
    kind_of(scheduler)
    if not (_host.is_flow(scheduler) or _host.is_preconditioned(scheduler)):
        _host.alphas_cumprod(scheduler)


def guided_output(guidance: Guidance, scheduler: Any, state: State, output: Tensor) -> Tensor | None:
    """Site S on a model output that is there already: the output to step with, or None if it stays as it is.

    Raises:
        ValueError: the guidance asks for a graph that `output` does not have, or moves the sample.
        FloatingPointError: the guided prediction is not finite.
    """
    x, prediction = state.x, prediction_of(scheduler, state.x, state.level, output)

    def predict(*, grad: bool = False) -> Prediction:
        if grad and not prediction.raw.requires_grad:
            raise ValueError(
                f"Guidance {guidance.name!r} differentiates through the denoiser, which has run before this guidance is asked: "
                "through_denoiser needs GuidedPipeline. Or use route 'x0_detached'."
            )
        require_unmoved(guidance, state, x)
        return prediction

    guided = guidance(state, predict)
    require_unmoved(guidance, state, x)
    if guided is prediction:
        return None
    _require_finite(guided, state, guidance)
    return model_output(scheduler, guided)


def require_unmoved(guidance: Guidance, state: State, x: Tensor) -> None:
    """Refuse a guidance that has moved `state.x` away from x, the sample that the denoiser has seen.

    Raises:
        ValueError: it has; names the guidance.
    """
    if state.x is not x:
        raise ValueError(
            f"Guidance {guidance.name!r} evaluates the denoiser at another sample than the pipeline did. Use GuidedPipeline."
        )


def prediction_of(scheduler: Any, x: Tensor, level: Level, output: Tensor) -> Prediction:
    """The prediction in what a pipeline hands to `scheduler.step`; the inverse of `genkit.sampling.model_output`.

    Args:
        x: the sample (B, C, ...).
        level: its noise level.
        output: (B, C, ...), or (B, 2C, ...) with a learned variance.
    """
    variance = None
    if output.shape[1] == 2 * x.shape[1]:
        output, variance = output.chunk(2, dim=1)
    if _host.is_preconditioned(scheduler):
        output = scheduler.precondition_outputs(x, output, broadcast(level.sigma, x))
    return Prediction(x, level, output, kind_of(scheduler), variance)


def evaluation_level(scheduler: Any, levels: list[Level], timestep: Any, last: int) -> Level:
    """The level of the evaluation that a scheduler is about to step from.

    Schedulers that count their steps say it themselves: timesteps may repeat, and a run may begin in the middle. For the others
    (DDIM, DDPM, PNDM) a timestep is a level, and of equal ones it is the next after entry `last`.

    Raises:
        ValueError: a timestep that is not in the schedule.
    """
    if hasattr(scheduler, "step_index"):
        if scheduler.step_index is not None:
            return levels[scheduler.step_index]
        if scheduler.begin_index is not None:
            return levels[scheduler.begin_index]
        on_device = timestep.to(scheduler.timesteps.device) if isinstance(timestep, Tensor) else timestep
        return levels[scheduler.index_for_timestep(on_device)]
    found = [level for level in levels if level.t == float(timestep)]
    if not found:
        raise ValueError(f"Timestep {float(timestep):g} is not in the schedule of {type(scheduler).__name__}.")
    return next((level for level in found if level.index > last), found[0])


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leaves inference mode, whose tensors autograd refuses to save; the grad mode stays."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def precise(x: Tensor) -> Tensor:
    """x in at least float32, as a tensor that autograd takes."""
    x = x.clone() if x.is_inference() else x
    return x.to(torch.promote_types(x.dtype, torch.float32))
