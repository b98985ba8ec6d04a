"""Guidance in any stock diffusers pipeline: `with attach(pipe, guidance): pipe(...)`.

Nearly every pipeline calls `scheduler.step(output, t, x)` with the output after classifier-free guidance and the sample before the
step, which is all that a guidance needs. Inside the block the scheduler is an instance of a subclass of its own class, with

    output <- guidance(predict)                 site S, where predict() reads output and x
    x_next <- scheduler.step(output, t, x)
    x_next <- guidance.after(x_next)            site M
    x_next <- guidance.before(x_next)           site X of the next evaluation; that of the first is in scale_model_input

so its configuration, its state and `isinstance` stay as they are. The network has run by then: no gradient goes through it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genkit import _host
from genkit.attention.proof import Proof
from genkit.guidance.base import Guidance, State
from genkit.guidance.energy import as_guidance
from genkit.guidance.evaluation import (
    evaluation_level,
    guided_output,
    ordinary_tensors,
    precise,
    require_family,
    require_unmoved,
)
from genkit.guidance.forms import Form, FormReader
from genkit.levels import levels_of


@contextmanager
def attach(
    pipe: Any,
    guidance: Guidance | Callable[..., Tensor],
    *,
    cond: Any = None,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Iterator[Any]:
    """Steer a stock pipeline inside the block; its scheduler is itself again at the end, also after an exception.

    Args:
        pipe: any diffusers pipeline with one scheduler of a supported family (see `genkit.levels`): text to image, ControlNet,
            inpainting, video, ... The guidance acts on whatever runs on this scheduler.
        guidance: with gradient route `direct` or `x0_detached`; a function is the energy of images. Blocks nest: an inner guidance
            is added to the outer one, exactly as `outer + inner`.
        cond: what guidances see as `state.cond`; the pipeline's own conditioning is not known here.
        seeds: seed of each sample, for guidances that draw noise.
        height, width: size of the pictures in pixels. Only needed where latents are packed into a sequence and the network is not
            told the position of each token (Flux is).

    What a guidance sees: samples (B, C, h, w), or (B, C, T, h, w) of videos, in float32 or float64, whatever the pipeline's own
    form and dtype. The two equal halves that `DiTPipeline` hands on are seen, and moved, as one. Image energies see each frame of a
    video; their values are averaged. Where a pipeline's latents are in a form that is not known, energies of `space="latent"` work.

    Each call of the pipeline is a new run: `state.cache` is empty at its start. A run may begin in the middle of the schedule
    (`strength` of image-to-image); `state.progress` is the position in the whole schedule.

    Raises:
        ValueError: on entry, for offloaded weights or a scheduler of no known family. From within the pipeline, for a guidance
            that needs the denoiser (`through_denoiser`, or another evaluation of the network), a displacement before the first
            evaluation of a pipeline that does not announce it, or sizes that do not fit. On exit, if the pipeline's scheduler was
            replaced within the block.
        FloatingPointError: the guided prediction became NaN or infinite; names the evaluation and the guidance.

    Example:
        >>> with attach(controlnet_pipe, ClassifierGuidance(classifier, "seven")):
        ...     controlnet_pipe("a photo of a digit", image=edges).images
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler to attach to. Use a diffusion pipeline.")
    if _host.is_offloaded(pipe):
        raise ValueError("Guidance needs gradients, which CPU offload breaks. Load the pipeline without offloading.")
    require_family(scheduler)
    guidance = as_guidance(guidance)
    for part in guidance.leaves():
        part.check(pipe)
    previous = type(scheduler)
    outer: _Session | None = getattr(previous, "_session", None)
    reader = FormReader(pipe, height, width)
    session = _Session(
        guidance if outer is None else outer.guidance + guidance,
        cond if cond is not None or outer is None else outer.cond,
        list(seeds) if seeds is not None else None if outer is None else outer.seeds,
        reader,
    )
    scheduler.__class__ = _guided_class(getattr(previous, "_original", previous), session)
    try:
        with reader.watching(), Proof(pipe):
            yield pipe
    finally:
        scheduler.__class__ = previous
    if pipe.scheduler is not scheduler:
        raise ValueError("The pipeline's scheduler was replaced within the block, so the guidance did not act. Replace it before.")


def _guided_class(original: Any, session: _Session) -> type:
    """A subclass of a scheduler's class. Its methods keep their signatures, which pipelines inspect for `eta` and `generator`.

    Only the attached scheduler belongs to it: what is made from it (a copy, a pickle, `from_config`) is of the original class.
    """
    signature = inspect.signature(original.step)

    def new(cls: type, *args: Any, **keywords: Any) -> Any:
        return original(*args, **keywords)

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (original,), dict(self.__dict__)

    @functools.wraps(original.step)
    def step(self: Any, *args: Any, **keywords: Any) -> Any:
        return session.step(original.step, signature.bind(self, *args, **keywords))

    @functools.wraps(original.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **keywords: Any) -> Any:
        session.state = None
        original.set_timesteps(self, *args, **keywords)

    members = {"__new__": new, "__reduce_ex__": reduce, "step": step, "set_timesteps": set_timesteps}
    if hasattr(original, "scale_model_input"):

        @functools.wraps(original.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, *args: Any, **keywords: Any) -> Tensor:
            timestep = args[0] if args else keywords.get("timestep")
            return original.scale_model_input(self, session.displaced_input(self, sample, timestep), *args, **keywords)

        members["scale_model_input"] = scale_model_input
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (original,), members | names | {"_session": session, "_original": original})


def _blank(cls: Any) -> Any:
    """An object without its attributes, for `copy` and `pickle` to fill."""
    return cls.__new__(cls)


class _Session:
    """The guidance of a scheduler, and the state of its current run (None before its first evaluation)."""

    def __init__(self, guidance: Guidance, cond: Any, seeds: list[int] | None, reader: FormReader) -> None:
        self.guidance, self.cond, self.seeds, self.reader = guidance, cond, seeds, reader
        self.state: State | None = None
        self.first: tuple[Tensor, Tensor] | None = None  # the sample of the first evaluation, and where `before` moved it
        self.stepped = False

    def step(self, step: Callable[..., Any], call: inspect.BoundArguments) -> Any:
        """The scheduler's step, guided at all three sites."""
        values = call.arguments
        scheduler, output, sample = values["self"], values["model_output"], values["sample"]
        if values.get("per_token_timesteps") is not None:
            raise ValueError("This pipeline has a noise level for each token, which guidance does not support.")
        with ordinary_tensors():
            form = self.reader.form(sample, output)
            state = self._enter(scheduler, values["timestep"], form.view(precise(sample)))
            if not self.stepped:
                values["sample"] = sample = self._first_sample(state, form, sample)
                self.stepped = True
            guided = guided_output(self.guidance, scheduler, state, form.view(precise(output)))
        if guided is not None:
            values["model_output"] = form.back(guided).to(output)
        result = step(*call.args, **call.kwargs)
        with ordinary_tensors():
            return self._displace(state, form, result)

    def displaced_input(self, scheduler: Any, batch: Tensor, timestep: Any) -> Tensor:
        """Site X of the first evaluation: what the network is to see for `batch`, k copies of the sample."""
        if self.state is not None and self.stepped:
            return batch
        known = _count(self.seeds) or _count(self.cond)
        copies = len(batch) // known if known and len(batch) % known == 0 else _copies(batch)
        sample = batch[: len(batch) // copies]
        with ordinary_tensors():
            form = self.reader.form(sample)
            state = self._enter(scheduler, timestep, form.view(precise(sample)))
            moved = self._before(state)
            if moved is state.x:
                self.first = state.x, moved
                return batch
            moved = form.back(moved).to(sample)
            self.first = state.x, form.view(precise(moved))
            return torch.cat([moved] * copies)

    def _enter(self, scheduler: Any, timestep: Any, x: Tensor) -> State:
        """The state at this evaluation, at sample x."""
        if self.state is None:
            levels = levels_of(scheduler)
            self.state = State(x, levels[0], levels, self.cond, self.reader.codec, self.seeds, scheduler)
            self.first, self.stepped = None, False
        state = self.state
        state.x, state.log = x, {}
        state.level = evaluation_level(scheduler, state.levels, timestep, state.level.index if self.stepped else -1)
        for name, given in (("seeds", self.seeds), ("conditions", self.cond)):
            if _count(given) not in (0, len(x)):
                raise ValueError(f"attach got {_count(given)} {name}, but the pipeline has {len(x)} samples. Give one for each.")
        return state

    def _first_sample(self, state: State, form: Form, sample: Tensor) -> Tensor:
        """The sample that the first evaluation saw, which is the pipeline's unless a displacement was announced."""
        if self.first is None:
            if self._before(state) is not state.x:
                raise ValueError(
                    f"Guidance {self.guidance.name!r} displaces samples before the denoiser, but this pipeline does not announce "
                    "the first evaluation. Use GuidedPipeline, or guidance.between(...) to start later."
                )
            return sample
        # Equal samples look like the copies of one.
        seen, moved = (torch.cat([x] * max(1, len(state.x) // len(x))) for x in self.first)
        if seen.shape == state.x.shape and torch.equal(moved, state.x):
            return sample
        if not torch.equal(seen, state.x):
            raise ValueError(
                "The pipeline steps from another sample than the one it scaled first, so it cannot be displaced there."
            )
        state.x = moved
        return form.back(moved).to(sample)

    def _displace(self, state: State, form: Form, result: Any) -> Any:
        """Sites M and X: a step's result, with its sample displaced."""
        original = result[0] if isinstance(result, tuple) else result.prev_sample
        x = x_next = form.view(precise(original))
        x_next = self.guidance.after(state, x_next)
        following = state.levels[state.level.index + 1 : state.level.index + 2]
        if following:
            index = state.level.index
            state.x, state.level, state.log = x_next, following[0], {}
            x_next = self._before(state)
            state.level = state.levels[index]
        if x_next is x:
            return result
        moved = form.back(x_next).to(original)
        if isinstance(result, tuple):
            return (moved, *result[1:])
        result.prev_sample = moved
        return result

    def _before(self, state: State) -> Tensor:
        x = state.x
        moved = self.guidance.before(state)
        require_unmoved(self.guidance, state, x)
        return moved


def _count(given: Any) -> int:
    """For how many samples seeds or a condition are; 0 if they do not say."""
    return len(given) if hasattr(given, "__len__") else 0


def _copies(batch: Tensor) -> int:
    """How many times a batch repeats itself, as the input of classifier-free guidance does: 3, 2 or 1."""
    for k in (3, 2):
        if len(batch) % k == 0 and all(torch.equal(part, batch[: len(batch) // k]) for part in batch.chunk(k)[1:]):
            return k
    return 1
