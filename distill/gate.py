"""The release gate: does an exported student, loaded again from disk, draw what the trainer's sampler draws?

Twice, in 1, 2, 4, ... steps, with the same noise on both sides and in float32: with the stock pipeline, called as the model card
says, and with `GuidedPipeline`. A student that paints into masks is tried with the stock pipeline alone, on the lower half of some
pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit import noise
from genkit.denoisers import Denoiser
from genkit.denoisers.flux import pack, unpack
from genkit.distill.masks import lower_half
from genkit.distill.path import Path
from genkit.distill.schedule import sample_levels, set_levels
from genkit.distill.spec import FewStepSpec
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline

TOLERANCE = 1e-4
_PROMPTS = ["a red seven", "a cat"]
_SEEDS = [0, 1]


def counts(spec: FewStepSpec) -> list[int]:
    """The numbers of steps that are tried: 1, 2, 4, ... up to the student's levels, and as many as those."""
    powers = [2**i for i in range(len(spec.levels).bit_length())]
    return sorted({count for count in powers if count <= len(spec.levels)} | {len(spec.levels)})


def stock_call(denoiser: Denoiser, spec: FewStepSpec, count: int) -> dict[str, Any] | None:
    """The arguments with which the family's own pipeline samples the student in `count` steps, besides the prompt.

    Args:
        denoiser: of the exported pipeline, with its scheduler, whose timesteps are set here.

    Returns:
        None where the pipeline cannot: its call takes no timesteps, or no class, or it does not scale the initial noise.
    """
    pipe = denoiser.pipe
    accepted = inspect.signature(pipe.__call__).parameters
    custom = set_levels(spec, denoiser, pipe.scheduler, count, denoiser.latent_shape(spec.height, spec.width))
    unconditional = "prompt" not in accepted and "class_labels" not in accepted
    if not set(custom) <= set(accepted) or (unconditional and subject(denoiser)):
        return None
    if _draws_pictures(denoiser) and float(pipe.scheduler.init_noise_sigma) != 1:
        return None
    call: dict[str, Any] = dict(custom) if custom else {"num_inference_steps": count}
    if denoiser.family == "Flux":  # whose guidance_scale is an input of the network
        if spec.guidance_scale != 1:
            call |= {"true_cfg_scale": spec.guidance_scale, "negative_prompt": ""}
    elif "guidance_scale" in accepted:
        call["guidance_scale"] = spec.guidance_scale
    if spec.task == "inpaint":
        call["strength"] = 1.0  # from pure noise, which is not the default of every family
    if spec.height is not None and "height" in accepted:
        call |= {"height": spec.height, "width": spec.width}
    return call


@torch.no_grad()
def differences(student: Denoiser, exported: DiffusionPipeline, spec: FewStepSpec) -> Iterator[tuple[str, int, float]]:
    """What an export differs by from the trainer's sampler.

    Args:
        student: the student in memory, in eval mode, with the weights as they are saved and its teacher's scheduler.
        exported: the pipeline loaded from disk, in float32.

    Yields:
        Which pipeline ("stock" or "genkit"), the number of steps, and the largest difference between two samples over their root
        mean square. Where the stock pipeline cannot be called for these levels there is no entry for it.
    """
    exported.set_progress_bar_config(disable=True)
    if spec.task == "inpaint":
        yield from _painted_differences(student, type(student)(exported), spec)
        return
    guided = GuidedPipeline.from_pipe(exported)
    guided.student = spec
    shape = guided.denoiser.latent_shape(spec.height, spec.width)
    for count in counts(spec):
        call = stock_call(guided.denoiser, spec, count)
        if call is not None:
            expected = _trained(student, spec, count, _stock_noise(student, shape, count))
            if _draws_pictures(student):
                expected = (student.decode(expected) / 2 + 0.5).clamp(0, 1)
            yield "stock", count, _distance(_stock(guided.denoiser, call, shape), expected)
        x = guided(**subject(student), num_inference_steps=count, seeds=_SEEDS, output_type="latent").images
        yield "genkit", count, _distance(x, _trained(student, spec, count, _seeded_noise(student, shape, count)))


def _painted_differences(student: Denoiser, exported: Denoiser, spec: FewStepSpec) -> Iterator[tuple[str, int, float]]:
    """The same for a student that gets a mask and what is outside of it."""
    size = [side * student.factor for side in student.latent_shape(spec.height, spec.width)[-2:]]
    pictures, mask = noise.normal(_SEEDS, (3, *size)).to(student.device).sigmoid(), lower_half(len(_SEEDS), size, student.device)
    codec: Any = student.codec  # all families that have such a pipeline have one
    for count in counts(spec):
        call = stock_call(exported, spec, count)
        if call is None:
            continue
        like = codec.encode(pictures)
        with _seeded(student):  # in the order in which the pipelines draw: initial noise, the VAE's, that of each step
            first = torch.randn(like.shape, device=like.device)
            rest = codec.encode((2 * pictures - 1) * (1 - mask), _default_generator(like.device))
            drawn = [first, *(torch.randn_like(first) for _ in range(count - 1))]
        concat = torch.cat([F.interpolate(mask, size=like.shape[-2:]), rest], dim=1)
        call |= {"image": pictures, "mask_image": mask}
        yield "stock", count, _distance(_stock(exported, call, like.shape[1:]), _trained(student, spec, count, drawn, concat))


def _trained(student: Denoiser, spec: FewStepSpec, count: int, drawn: list[Tensor], concat: Tensor | None = None) -> Tensor:
    """Clean samples (B, C, h, w) by the trainer's sampler."""
    names = {"prompt": "prompts", "class_labels": "labels"}
    cond = student.condition(**{names[name]: value for name, value in subject(student).items()})
    if concat is not None:
        cond = cond.with_concat(concat)

    def x0_of(x: Tensor, level: Level) -> Tensor:
        return student(x, level, cond if cond.tensors else None, guidance_scale=spec.guidance_scale).x0

    return sample_levels(x0_of, Path(student.pipe.scheduler), spec.visited(count), drawn.__getitem__, spec.sampler)


def _stock(denoiser: Denoiser, call: dict[str, Any], shape: Sequence[int]) -> Tensor:
    """Samples (B, C, h, w) of the stock pipeline, or pictures (B, 3, H, W) in [0, 1] where it gives nothing else."""
    accepted = inspect.signature(denoiser.pipe.__call__).parameters
    arguments = {**call, **(subject(denoiser) or {"batch_size": len(_SEEDS)})}
    if "height" in accepted:
        arguments |= {"height": shape[-2] * denoiser.factor, "width": shape[-1] * denoiser.factor}
    if "use_resolution_binning" in accepted:
        arguments["use_resolution_binning"] = False
    if "negative_prompt" in call:
        arguments["negative_prompt"] = [call["negative_prompt"]] * len(_SEEDS)
    with _seeded(denoiser):
        images = denoiser.pipe(**arguments, output_type="np" if _draws_pictures(denoiser) else "latent").images
    if _draws_pictures(denoiser):
        return torch.as_tensor(images).permute(0, 3, 1, 2)
    return unpack(images, shape[-2] // 2) if denoiser.family == "Flux" else images


def _stock_noise(student: Denoiser, shape: Sequence[int], count: int) -> list[Tensor]:
    """What a stock pipeline draws without a generator: the initial noise, then that of each step."""
    with _seeded(student):
        first = torch.randn((len(_SEEDS), *shape), device=student.device)
        if student.family == "Flux":  # whose scheduler sees packed samples
            packed = [torch.randn(pack(first).shape, device=student.device) for _ in range(count - 1)]
            return [first, *(unpack(tokens, shape[-2] // 2) for tokens in packed)]
        return [first, *(torch.randn_like(first) for _ in range(count - 1))]


def _seeded_noise(student: Denoiser, shape: Sequence[int], count: int) -> list[Tensor]:
    """What `GuidedPipeline` draws for seeds."""
    generators, size = noise.generators(_SEEDS, noise.SAMPLER), (len(_SEEDS), *shape)
    steps = [randn_tensor(size, generator=generators, device=student.device, dtype=torch.float32) for _ in range(count - 1)]
    return [noise.normal(_SEEDS, shape).to(student.device), *steps]


def _default_generator(device: torch.device) -> torch.Generator:
    """The generator from which tensors on a device are drawn where none is given."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


@contextmanager
def _seeded(denoiser: Denoiser) -> Iterator[None]:
    """The global generators at a known place inside the block, and as they were after it."""
    devices = [denoiser.device] if denoiser.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(_SEEDS[0])
        yield


def subject(denoiser: Denoiser) -> dict[str, Any]:
    """What is drawn, two of it, as the pipelines take it; nothing for an unconditional model."""
    if denoiser.family == "DiT" or (denoiser.family == "UNet2D" and denoiser.network.config.num_class_embeds):
        return {"class_labels": [0, 1]}
    return {} if denoiser.family == "UNet2D" else {"prompt": _PROMPTS}


def _draws_pictures(denoiser: Denoiser) -> bool:
    """Whether the stock pipeline returns pictures only."""
    return denoiser.family in ("UNet2D", "DiT")


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.square().mean().sqrt())
