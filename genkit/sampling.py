"""The one sampling loop. `scheduler.step` is the only integrator.

for each network evaluation:
    x      <- guidance.before(x)
    pred   <- guidance(predict)                        predict: one call of the denoiser
    x_next <- scheduler.step(output of pred, t, x)
    x      <- guidance.after(x_next)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit import _host
from genkit.attention.proof import Proof, proving
from genkit.levels import Level, broadcast, kind_of, levels_of
from genkit.prediction import Prediction

if TYPE_CHECKING:
    from genkit.denoisers import Cond, Denoiser
    from genkit.guidance import Guidance, State

Callback = Callable[["State", Prediction, Tensor], Tensor | None]


def sample(
    denoiser: Denoiser,
    scheduler: Any,
    x: Tensor,
    cond: Cond | None = None,
    *,
    guidance: Guidance | None = None,
    guidance_scale: float = 1.0,
    seeds: Sequence[int] | None = None,
    generator: Any = None,
    eta: float = 0.0,
    on_step: Callback | None = None,
    interrupted: Callable[[], bool] | None = None,
    grad_evaluations: int | None = None,
) -> Tensor:
    """Run the scheduler's timesteps from `x` and return the final sample (B, ...).

    Args:
        x: initial sample (B, ...): `scheduler.init_noise_sigma` times standard normal noise.
        cond: conditioning of the B samples.
        guidance: steers the run; None is the plain sampler.
        guidance_scale: classifier-free guidance.
        seeds: seed of each sample, for the counter-based noise of guidances.
        generator: one, or a list of B, for the noise of stochastic schedulers.
        eta: noise of DDIM-like schedulers, 0 to 1.
        on_step: called as `(state, prediction, x_next)` after each evaluation; may return another `x_next`.
        interrupted: asked before each evaluation; True ends the run early.
        grad_evaluations: differentiate through the last so many network evaluations and run those before without a graph;
            None leaves the caller's gradient mode. A second-order scheduler has two evaluations a step.

    Raises:
        ValueError: `grad_evaluations` is negative or more than there are.
        FloatingPointError: the prediction became NaN or infinite; names the evaluation and the guidance.
    """
    from genkit.guidance.base import State

    levels = levels_of(scheduler)
    if grad_evaluations is not None and not 0 <= grad_evaluations <= len(levels):
        raise ValueError(f"grad_evaluations={grad_evaluations} must be 0 to {len(levels)}, the number of network evaluations.")
    _host.begin(scheduler)
    state = State(x, levels[0], levels, cond, denoiser.codec, None if seeds is None else list(seeds), scheduler, denoiser)

    def predict(*, grad: bool = False) -> Prediction:
        # Without `grad` the caller's mode stands, so a differentiable sampler works.
        with torch.set_grad_enabled(grad or torch.is_grad_enabled()):
            x = state.x.detach().requires_grad_(True) if grad and not state.x.requires_grad else state.x
            return denoiser(x, state.level, state.cond, guidance_scale=guidance_scale)

    with proving(Proof(denoiser, audits=False)) as proof:
        for level in levels:
            if interrupted is not None and interrupted():
                break
            state.level, state.log = level, {}
            grad = torch.is_grad_enabled() if grad_evaluations is None else level.index >= len(levels) - grad_evaluations
            # Steps of one kind call the same networks on the same shapes. What a guidance calls is not known.
            kind = ("step", tuple(x.shape), str(x.dtype), guidance_scale in (0.0, 1.0), grad)
            with torch.set_grad_enabled(grad):
                with proof.step(*kind, fresh=guidance is not None):
                    if guidance is not None:
                        state.x = guidance.before(state)
                    prediction = predict() if guidance is None else guidance(state, predict)
                _require_finite(prediction, state, guidance)
                x_next = step(scheduler, level, prediction, state.x, generator=generator, eta=eta)
                if guidance is not None:
                    x_next = guidance.after(state, x_next)
                if on_step is not None:
                    replaced = on_step(state, prediction, x_next)
                    x_next = x_next if replaced is None else replaced
            state.x = x_next
    return state.x


def step(scheduler: Any, level: Level, prediction: Prediction, x: Tensor, *, generator: Any = None, eta: float = 0.0) -> Tensor:
    """The scheduler's step from x (B, ...) at `level` with a prediction made there: the sample at the next level."""
    arguments = _step_arguments(scheduler, level, generator, eta)
    t = scheduler.timesteps[level.index]
    return scheduler.step(model_output(scheduler, prediction), t, x, **arguments, return_dict=False)[0]


def model_output(scheduler: Any, prediction: Prediction) -> Tensor:
    """What `scheduler.step` expects for a prediction: its own kind, preconditioning undone, learned variance appended."""
    if _host.is_preconditioned(scheduler):
        # x0 = c_skip x + c_out F is affine in the network output F; the scheduler itself says which c_skip and c_out.
        x0, sigma = prediction.x0, broadcast(prediction.level.sigma, prediction.x0)
        zero = torch.zeros_like(x0)
        skip = scheduler.precondition_outputs(prediction.x, zero, sigma)
        return (x0 - skip) / scheduler.precondition_outputs(zero, zero + 1, sigma)
    raw = prediction.to(kind_of(scheduler)).raw
    if prediction.variance is not None and _host.takes_variance(scheduler):
        return torch.cat([raw, prediction.variance.to(raw)], dim=1)
    return raw


def _step_arguments(scheduler: Any, level: Level, generator: Any, eta: float) -> dict[str, Any]:
    """The optional arguments that this scheduler's `step` takes."""
    accepted = inspect.signature(scheduler.step).parameters
    following = scheduler.timesteps[level.index + 1 : level.index + 2]
    # UnCLIP does not know its own timesteps: untold, it goes to t - 1.
    values = {"generator": generator, "eta": eta, "prev_timestep": following[0] if len(following) else None}
    return {name: value for name, value in values.items() if name in accepted}


def _require_finite(prediction: Prediction, state: State, guidance: Guidance | None) -> None:
    if torch.isfinite(prediction.raw).all():
        return
    good = int(torch.isfinite(prediction.raw).flatten(1).all(1).sum())
    cause = "the model alone" if guidance is None else f"guidance {guidance.name!r}"
    raise FloatingPointError(
        f"Evaluation {state.level.index + 1} of {len(state.levels)} (timestep {state.level.t:g}) with {cause} gave NaN or infinity "
        f"for {len(prediction.raw) - good} of {len(prediction.raw)} samples. Lower its scale, or use --dtype float32."
    )
