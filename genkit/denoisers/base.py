"""The contract that hides a model family: `Denoiser(x, level, cond) -> Prediction`.

A family implements two small things: how to make its conditioning (`condition`), and how to call its network (`_forward`).
Everything else (what the network predicts, input scaling, classifier-free guidance in one batch, timesteps, codec) is here.

A new family, whole:

    @genkit.denoisers.register
    class MyDenoiser(Denoiser):
        family = "mine"
        classes = ("MyPipeline",)          # and every subclass of a class of that name
        inputs = ("prompt_embeds",)        # the tensors that `_forward` cannot do without

        def condition(self, prompts=None, negative_prompts=None, **extra):
            self._refuse(extra, "prompts", "negative_prompts")
            embeds = encode(self.pipe, prompts)                                   # (B, L, D)
            null = encode(self.pipe, negative_prompts or [""] * len(prompts))     # (B, L, D)
            return Cond({"prompt_embeds": embeds}, {"prompt_embeds": null})

        def _forward(self, z, level, tensors):
            return self.network(z, self._time(z, level), tensors["prompt_embeds"]).sample

Where prompts are all of it, `genkit.denoisers.text.TextDenoiser` also has the checks and the cache of encoded prompts.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from genkit import _host
from genkit.latents import LatentCodec
from genkit.levels import Level, broadcast, kind_of
from genkit.prediction import Prediction

if TYPE_CHECKING:
    from genkit.layouts.grounding import Grounding
    from genkit.scoring import Pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Cond:
    """Conditioning of a batch: named tensors (B, ...), and those of the null condition.

    `tensors` is empty for an unconditional model. `null_tensors` is None for a model that has no null condition;
    classifier-free guidance then refuses.

    The tensor "concat" (B, C', h, w), of inpainting and editing networks, is put behind the channels of the sample.

    Raises:
        ValueError: tensors of different batch sizes, or a null condition of other names or shapes.

    Example:
        >>> cond = denoiser.condition(prompts=["a red seven", "a blue one"])
        >>> cond[0:1], cond.null(), cond.repeat(4), len(cond)
    """

    tensors: dict[str, Tensor]
    null_tensors: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        sizes = {name: len(v) for name, v in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Every tensor of a condition has one row for each sample, but the numbers of rows are {sizes}.")
        shapes = {name: tuple(v.shape) for name, v in self.tensors.items()}
        if self.null_tensors is not None:
            null_shapes = {name: tuple(v.shape) for name, v in self.null_tensors.items()}
            if shapes != null_shapes:
                raise ValueError(f"The condition has shapes {shapes}, but its null condition has {null_shapes}. Make them equal.")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else 0

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Cond:
        """The condition of some samples; one index keeps the batch dimension."""
        rows = [index] if isinstance(index, int) else index
        return self._map(lambda v: v[rows])

    def repeat(self, count: int) -> Cond:
        """Each row `count` times in a row."""
        return self._map(lambda v: v.repeat_interleave(count, dim=0))

    def with_concat(self, concat: Tensor) -> Cond:
        """The same condition with a tensor (B, C', h, w) behind the channels of the sample; the null condition has it too."""
        null = None if self.null_tensors is None else self.null_tensors | {"concat": concat}
        return Cond(self.tensors | {"concat": concat}, null)

    def without_concat(self) -> Cond:
        """The condition for a network that takes the sample alone."""

        def rest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value for name, value in tensors.items() if name != "concat"}

        return Cond(rest(self.tensors), None if self.null_tensors is None else rest(self.null_tensors))

    def joined(self, other: Cond) -> Cond:
        """The conditions of these samples, then those of another batch."""

        def cat(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.cat([value, second[name]]) for name, value in first.items()}

        nulls = (self.null_tensors, other.null_tensors)
        return Cond(cat(self.tensors, other.tensors), None if nulls[0] is None or nulls[1] is None else cat(nulls[0], nulls[1]))

    def to(self, device: torch.device | str) -> Cond:
        """The same condition on another device."""
        return self._map(lambda v: v.to(device))

    def null(self) -> Cond:
        """The null condition (empty or negative prompt, null class) of the same batch."""
        if self.null_tensors is None:
            raise ValueError("This model has no null condition. Use guidance_scale=1.")
        return Cond(self.null_tensors, self.null_tensors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Cond:
        null = None if self.null_tensors is None else {k: function(v) for k, v in self.null_tensors.items()}
        return Cond({k: function(v) for k, v in self.tensors.items()}, null)


class Denoiser(ABC):
    """A pretrained diffusion network seen as a function of sample, level and condition.

    Attributes:
        kind: what the network predicts: "eps", "x0", "v" or "flow".
        codec: the latent codec, or None for a pixel-space model.
        pipe: the diffusers pipeline whose components are used.
        family: name of the family, for messages.
        classes: names of the pipeline classes that the adapter serves, subclasses included.
        inputs: names of the condition's tensors without which the network cannot run.
        cross_attended: names of those (B, S, ...) that reach the network through its cross-attention alone, token by token;
            classifiers then compute them once a prompt (`genkit.attention.folding`).
    """

    family: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]] = ()
    cross_attended: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.kind = kind_of(pipe.scheduler)
        self.codec = LatentCodec.of(pipe)

    @classmethod
    def of(cls, pipe: Any, **options: Any) -> Denoiser:
        """The adapter of a diffusers pipeline, found by its class; `options` are those of the adapter.

        Raises:
            ValueError: no adapter is known; the message lists the supported families.
        """
        from genkit.denoisers import find

        return find(pipe)(pipe, **options)

    # What a family provides

    @abstractmethod
    def condition(self, *args: Any, **inputs: Any) -> Cond:
        """Conditioning of a batch from prompts, labels or embeddings.

        Raises:
            ValueError: an input that the family does not take, or takes in another form.
        """

    @abstractmethod
    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        """Raw network output (B, C or 2C, ...) for the scaled input z; z and all floating `tensors` have the network's dtype."""

    @property
    def network(self) -> Any:
        """The module that is evaluated."""
        return getattr(self.pipe, network_name(self.pipe))

    def set_timesteps(
        self,
        scheduler: Any,
        count: int,
        latent_shape: Sequence[int],
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """`scheduler.set_timesteps` the way that the family's own pipeline calls it.

        Args:
            count: number of steps; not used with `timesteps` or `sigmas`.
            latent_shape: shape (..., h, w) of a sample; some flow-matching schedules depend on the size.
            timesteps, sigmas: the schedule itself; at most one of them.

        Raises:
            ValueError: both were given, or the scheduler takes no schedule of that form.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("Both timesteps and sigmas were given. Give one of them.")
        arguments: dict[str, Any] = {"num_inference_steps": count}
        if timesteps is not None:
            arguments = {"timesteps": list(timesteps)}
        if sigmas is not None:
            arguments = {"sigmas": list(sigmas)}
        name = next(iter(arguments))
        if not accepts(scheduler, name):
            raise ValueError(f"{type(scheduler).__name__} takes no custom {name}. Use another scheduler, or a number of steps.")
        scheduler.set_timesteps(**arguments, device=device, **self._schedule_arguments(scheduler, latent_shape))

    def _schedule_arguments(self, scheduler: Any, latent_shape: Sequence[int]) -> dict[str, Any]:
        """What else `scheduler.set_timesteps` gets."""
        return {}

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Shape (C, h, w) of one sample for a picture of the given size in pixels, by default the model's own.

        Raises:
            ValueError: a size the model does not take, or no size where the model has none of its own.
        """
        multiple = self.factor * self._size_multiple()
        shape = []
        for name, value, default in zip(("height", "width"), (height, width), self._default_size(), strict=True):
            if value is None:
                if default is None:
                    raise ValueError(f"The model has no size of its own. Give {name}, a multiple of {multiple}.")
                value = default * self.factor
            if value < multiple or value % multiple:
                raise ValueError(f"{name}={value} does not fit the model. Use a positive multiple of {multiple}.")
            shape.append(value // self.factor)
        return (self._channels(), *shape)

    def _default_size(self) -> tuple[int | None, int | None]:
        """Height and width of the latents that the model was made for."""
        size = self.network.config.sample_size
        return (size, size) if size is None or isinstance(size, int) else tuple(size)

    def _channels(self) -> int:
        """Channels of a sample."""
        return self.network.config.in_channels

    def _size_multiple(self) -> int:
        """Latent sizes must be a multiple of this."""
        return getattr(self.network.config, "patch_size", None) or 1

    def grounding(self, class_names: Sequence[str] | None = None) -> Grounding:
        """How the model is told of layouts of some classes, by default all that it knows.

        Raises:
            ValueError: the family has no layout condition, or does not know a class.
        """
        raise ValueError(f"{self.family} has no layout condition. Use a layout-to-image model, such as 'scenes'.")

    # What everyone uses

    @property
    def factor(self) -> int:
        """Pixels that make one element of a sample, along a side."""
        return 1 if self.codec is None else self.codec.factor

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        weight = next(self.network.parameters(), None)
        if weight is not None and (weight.device.type != "cpu" or not torch.accelerator.is_available()):
            return weight.device
        # Weights may be offloaded; diffusers asks every module for its hooks, which takes as long as a pass of a small network.
        return getattr(self.pipe, "_execution_device", None) or self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The network's dtype."""
        return self.network.dtype

    @property
    def taps(self) -> list[str]:
        """Names of the places in the network that `genkit.features` reads, in the order in which they run."""
        from genkit.features.taps import taps_of

        return list(taps_of(self.network))

    def encode(self, images: Tensor) -> Tensor:
        """Clean samples (B, c, h, w) of images (B, 3, H, W) in [-1, 1]; a pixel-space model's are the images."""
        return images if self.codec is None else self.codec.encode(images)

    def decode(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of clean samples (B, c, h, w)."""
        return x0 if self.codec is None else self.codec.decode(x0)

    def __call__(self, x: Tensor, level: Level, cond: Cond | None = None, *, guidance_scale: float = 1.0) -> Prediction:
        """Evaluate the network once.

        Args:
            x: noisy samples (B, ...) in the scheduler's own variable.
            level: their noise level.
            cond: conditioning of the B samples.
            guidance_scale: classifier-free guidance w, raw = null + w (cond - null) (Ho & Salimans 2022, arXiv
                2207.12598); both halves run as one batch. 1 evaluates the condition alone, 0 the null condition alone.

        Returns:
            The prediction, of kind `self.kind`, float32 or float64.

        Raises:
            ValueError: a condition that lacks what the model needs, or of another batch size than x.
        """
        cond = Cond({}) if cond is None else cond
        missing = [name for name in self.inputs if name not in cond.tensors]
        if missing:
            raise ValueError(f"{self.family} needs a condition with {', '.join(missing)}. Make it with denoiser.condition(...).")
        if cond.tensors and len(cond) != len(x):
            raise ValueError(f"The condition is for {len(cond)} samples, but x has {len(x)}. Use cond.repeat or cond[...].")
        if guidance_scale == 1.0 or not cond.tensors:
            raw, variance = self._evaluate(x, level, cond.tensors)
        elif guidance_scale == 0.0:
            raw, variance = self._evaluate(x, level, cond.null().tensors)
        else:
            null = cond.null().tensors
            both = {k: torch.cat([null[k], v]) for k, v in cond.tensors.items()}
            raw, variance = self._evaluate(torch.cat([x, x]), _twice(level), both)
            raw_null, raw_cond = raw.chunk(2)
            raw = raw_null + guidance_scale * (raw_cond - raw_null)
            variance = None if variance is None else variance.chunk(2)[1]
        return Prediction(x, level, raw, self.kind, variance)

    def losses(
        self, x0: Tensor, pairs: Pairs, cond: Cond, *, metric: str = "l2", batch_size: int = 128, fold: bool = True
    ) -> Tensor:
        """How well each condition explains each sample on each pair.

        Args:
            x0: clean samples (I, ...).
            pairs: N pairs of level and noise, see `genkit.scoring.PairPlan`; all samples and conditions share them.
            cond: K conditions.
            metric: "l2", "l1" or "huber", of the error of eps, averaged over the values of a sample.
            batch_size: network evaluations at a time.
            fold: compute once what rows share, where the family allows it (`genkit.attention.folding`); equal up to rounding.

        Returns:
            (I, K, N) in float64, not weighted; lower is better.

        Raises:
            ValueError: an unknown metric.
        """
        from genkit.scoring.losses import grid_losses

        return grid_losses(self, x0, pairs, cond, metric, batch_size, fold)

    def _evaluate(self, x: Tensor, level: Level, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Scaled input, network, preconditioning; splits off a learned variance."""
        # Everything floating in the network's dtype, as the pipelines have it: text encoders may run in another.
        tensors = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        z = self._scale_input(x, level).to(self.dtype)
        if "concat" in tensors:
            z = torch.cat([z, tensors.pop("concat")], dim=1)
        output = self._forward(z, level, tensors)
        variance = None
        if output.shape[1] == 2 * x.shape[1]:
            output, variance = output.chunk(2, dim=1)
        output = output.to(torch.promote_types(x.dtype, torch.float32))
        scheduler = self.pipe.scheduler
        if _host.is_preconditioned(scheduler):
            output = scheduler.precondition_outputs(x, output, broadcast(level.sigma, x))
        return output, variance

    def _scale_input(self, x: Tensor, level: Level) -> Tensor:
        """x in the variable that the network was trained on (what `scale_model_input` does, without its state)."""
        scheduler = self.pipe.scheduler
        if _host.is_preconditioned(scheduler):
            return scheduler.precondition_inputs(x, broadcast(level.sigma, x))
        # A network on flow sigmas sees (1 - sigma) x0 + sigma eps as it is, whatever it predicts.
        flow = self.kind == "flow" or scheduler.config.get("use_flow_sigmas", False)
        m = level.alpha + level.sigma if flow else level.norm
        return x / broadcast(m, x)

    def _time(self, z: Tensor, level: Level) -> Tensor:
        """The timestep as a tensor (B,) on the device of z, an integer or float32."""
        t = torch.as_tensor(level.t)
        return t.to(device=z.device, dtype=torch.float32 if t.is_floating_point() else t.dtype).expand(len(z))

    def _refuse(self, extra: dict[str, Any], *accepted: str) -> None:
        """Raise for an input of `condition` that the family does not take; None counts as not given."""
        unknown = [name for name, value in extra.items() if value is not None]
        if unknown:
            takes = f"It takes {', '.join(accepted)}." if accepted else "It takes nothing."
            raise ValueError(f"The condition of {self.family} takes no {', '.join(unknown)}. {takes}")


def network_name(pipe: Any) -> str:
    """What a pipeline calls its network: "unet" or "transformer"."""
    return "transformer" if getattr(pipe, "unet", None) is None else "unet"


def with_network(denoiser: Denoiser, network: Any, device: torch.device | None = None) -> Denoiser:
    """The same adapter around another network of its family, on its device by default; prompts are encoded with the original."""
    shell = copy.copy(denoiser)
    components = {network_name(denoiser.pipe): network, "scheduler": denoiser.pipe.scheduler}
    shell.pipe = SimpleNamespace(**components, _execution_device=denoiser.device if device is None else device)
    return shell


def accepts(scheduler: Any, argument: str) -> bool:
    """Whether `scheduler.set_timesteps` takes an argument of this name."""
    return argument in inspect.signature(scheduler.set_timesteps).parameters


def _twice(level: Level) -> Level:
    """The level of the batch [x, x]."""

    def twice(value: float | Tensor) -> float | Tensor:
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim else value

    return dataclasses.replace(level, alpha=twice(level.alpha), sigma=twice(level.sigma), t=twice(level.t))
