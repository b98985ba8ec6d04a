"""Guidance in Modular Diffusers: `pipe.update_components(guider=as_guider(guidance, pipe.scheduler))`.

A guider of diffusers sees predictions only. This one wraps another (classifier-free guidance by default), notes the sample that the
network is called with, and shifts what the other made of the predictions:

    x          <- input of the network, with the scheduler's scaling undone
    prediction <- inner guider(predictions)
    prediction <- guidance(predict)                     site S, where predict() reads prediction and x

With route `through_denoiser` the network runs with a graph from x, which the modular blocks' own `no_grad` does not prevent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance, ClassifierFreeGuidance
from torch import Tensor, nn

from genkit.guidance.base import Guidance, State
from genkit.guidance.energy import as_guidance
from genkit.guidance.evaluation import evaluation_level, guided_output, ordinary_tensors, precise, require_family
from genkit.guidance.forms import PipelineCodec
from genkit.latents import LatentCodec
from genkit.levels import levels_of


def as_guider(
    guidance: Guidance | Callable[..., Tensor],
    scheduler: Any,
    codec: LatentCodec | None = None,
    *,
    guider: BaseGuidance | None = None,
    cond: Any = None,
    seeds: Sequence[int] | None = None,
) -> BaseGuidance:
    """A diffusers guider that steers a modular pipeline. Experimental, as diffusers' guiders are.

    Args:
        guidance: with any gradient route; it may not displace samples (EluCD's two algorithms do). A function is the energy of
            images.
        scheduler: the pipeline's own scheduler object, which says what the network predicts at which noise level.
        codec: `LatentCodec.of(pipe)`, for energies of images; None for pixel-space models.
        guider: combines the conditional and unconditional predictions first; by default `ClassifierFreeGuidance()` (scale 7.5).
        cond: what guidances see as `state.cond`.
        seeds: seed of each sample, for guidances that draw noise.

    The network must be called with the sample alone: blocks that append a mask or a picture to its channels are refused. A guider
    made here is not saved with a pipeline.

    Raises:
        ValueError: a scheduler of no known family, or a guidance that displaces samples; at the first step, a network input that is
            not the sample.
        FloatingPointError: the guided prediction became NaN or infinite; names the evaluation and the guidance.

    Example:
        >>> pipe = blocks.init_pipeline(repository)
        >>> guider = as_guider(ClassifierGuidance(classifier, "seven"), pipe.scheduler, LatentCodec.of(pipe))
        >>> pipe.update_components(guider=guider)
        >>> pipe(prompt="a photo of a digit").images
    """
    guidance = as_guidance(guidance)
    require_family(scheduler)
    if _displaces(guidance):
        raise ValueError(f"Guidance {guidance.name!r} displaces samples, which a guider cannot. Use attach or GuidedPipeline.")
    return _Guider(guidance, scheduler, codec, guider or ClassifierFreeGuidance(), cond, None if seeds is None else list(seeds))


def _displaces(guidance: Guidance) -> bool:
    """Whether a part of a guidance uses site X or M."""
    return any(type(leaf).before is not Guidance.before or type(leaf).after is not Guidance.after for leaf in guidance.leaves())


class _Guider(BaseGuidance):
    """See `as_guider`. Everything that is not about the shift is the inner guider's."""

    _input_predictions: list[str] = []  # noqa: RUF012 (diffusers asks for a list; the inner guider has the names)

    def __init__(
        self,
        guidance: Guidance,
        scheduler: Any,
        codec: LatentCodec | None,
        guider: BaseGuidance,
        cond: Any,
        seeds: list[int] | None,
    ) -> None:
        self.guider = guider
        super().__init__(enabled=guider._enabled)
        self.register_to_config()
        self.guidance, self.scheduler, self.cond, self.seeds = guidance, scheduler, cond, seeds
        self.codec = None if codec is None else PipelineCodec(**{f.name: getattr(codec, f.name) for f in dataclasses.fields(codec)})
        self._state: State | None = None
        self._seen = False  # whether the sample of this evaluation was noted
        self._restore: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "guider" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.guider, name)

    @property
    def is_conditional(self) -> bool:
        return self.guider.is_conditional

    @property
    def num_conditions(self) -> int:
        return self.guider.num_conditions

    def enable(self) -> None:
        super().enable()
        self.guider.enable()

    def disable(self) -> None:
        super().disable()
        self.guider.disable()

    def prepare_inputs(self, data: Any) -> Any:
        return self.guider.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        return self.guider.prepare_inputs_from_block_state(data, input_fields)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Called before each evaluation; step 0 begins a run."""
        super().set_state(step, num_inference_steps, timestep)
        self.guider.set_state(step, num_inference_steps, timestep)
        last = -1
        if step == 0 or self._state is None:
            levels = levels_of(self.scheduler)
            self._state = State(torch.empty(0), levels[0], levels, self.cond, self.codec, self.seeds, self.scheduler)
        else:
            last = self._state.level.index
        self._state.level, self._state.log = evaluation_level(self.scheduler, self._state.levels, timestep, last), {}
        self._seen = False

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self.guider.prepare_models(denoiser)
        own = denoiser.__dict__.get("forward")
        forward = denoiser.forward

        def restore() -> None:
            denoiser.__dict__.pop("forward", None)
            if own is not None:
                denoiser.__dict__["forward"] = own
            self._restore = lambda: None

        def once(*args: Any, **keywords: Any) -> Any:
            restore()  # first, so that an exception leaves nothing behind
            name = next((name for name in ("hidden_states", "sample") if name in keywords), None)
            z = self._noted(args[0] if name is None else keywords[name])
            args, keywords = ((z, *args[1:]), keywords) if name is None else (args, keywords | {name: z})
            with torch.set_grad_enabled(z.requires_grad):
                return forward(*args, **keywords)

        denoiser.__dict__["forward"] = once
        self._restore = restore

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._restore()
        self.guider.cleanup_models(denoiser)

    def _noted(self, z: Tensor) -> Tensor:
        """Notes the sample in a network's input z, and returns the input to run with, with a graph from the sample if need be."""
        state = self._require_state()
        unit = torch.ones(1, dtype=torch.float64)
        scale = self.scheduler.scale_model_input(unit, self._timestep) if hasattr(self.scheduler, "scale_model_input") else unit
        if not self._seen:
            with ordinary_tensors():
                state.x = precise(z.detach()) / scale.item()
                if self.guidance.wants_graph(state):
                    state.x.requires_grad_(True)
            self._seen = True
        if not state.x.requires_grad:
            return z
        with torch.enable_grad():
            return (state.x * scale.item()).to(z.dtype)

    def __call__(self, data: Any) -> Any:
        state = self._require_state()
        with torch.set_grad_enabled(state.x.requires_grad):
            output = self.guider(data)
        seen, predicted = state.x.shape, output.pred.shape
        channels = (seen[1], 2 * seen[1])  # with a learned variance
        if (seen[0], *seen[2:]) != (predicted[0], *predicted[2:]) or predicted[1] not in channels:
            raise ValueError(
                f"The network is called with {tuple(seen)} but predicts {tuple(predicted)}: its input is not the sample alone. "
                "Use attach."
            )
        with ordinary_tensors(), torch.set_grad_enabled(state.x.requires_grad):
            guided = guided_output(self.guidance, self.scheduler, state, precise(output.pred))
        output.pred = output.pred.detach() if guided is None else guided.detach().to(output.pred.dtype)
        return output

    def _require_state(self) -> State:
        if self._state is None:
            raise ValueError("The guider was not told the step. Call set_state before the network, as modular blocks do.")
        return self._state
