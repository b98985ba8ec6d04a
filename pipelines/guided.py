"""GuidedPipeline: any supported diffusers pipeline, sampled by genkit's loop and steered by any guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from genkit import _host, noise
from genkit.attention.proof import Proof
from genkit.denoisers import Cond
from genkit.distill.schedule import set_levels
from genkit.guidance import Guidance, State, as_guidance
from genkit.pipelines.base import HostedPipeline
from genkit.prediction import Prediction
from genkit.sampling import sample

CALLBACK_TENSORS = ("latents", "x0", "eps", "energy")


@dataclasses.dataclass
class GuidedPipelineOutput(BaseOutput):
    """What `GuidedPipeline` returns.

    Args:
        images: list of PIL images, or an array or tensor (B, H, W, 3) / (B, 3, H, W) in [0, 1], or latents.
        seeds: seed of each image; None where a generator or latents were given.
        energy: last value of each guidance's energy (B,), by its name.
    """

    images: Any
    seeds: list[int] | None = None
    energy: dict[str, Tensor] | None = None


class GuidedPipeline(HostedPipeline):
    """Wraps a diffusers pipeline (`host`): same components, same call conventions, plus `guidance` and per-image `seeds`.

    See `HostedPipeline` for `from_pipe`, `from_pretrained`, `load_tokens`, and what else the wrapper has.

    Example:
        >>> pipe = GuidedPipeline.from_pretrained("digits")
        >>> pipe("a red seven on a yellow background", seeds=[0, 1]).images
        >>> pipe = GuidedPipeline.from_pipe(any_stable_diffusion_pipeline)
        >>> pipe("a bird", guidance=EnergyGuidance(my_score, scale=10.0))
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        eta: float = 0.0,
        guidance: Guidance | Callable[..., Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **conditioning: Any,
    ) -> GuidedPipelineOutput | tuple[Any, ...]:
        """Generate images.

        Args:
            prompt, negative_prompt: text, one or several. "" is the null prompt.
            class_labels: for class-conditional models: indices or names.
            height, width: in pixels; the model's own size by default.
            num_inference_steps: by default 30, or a few-step student's own number; a student visits the levels it was trained at.
            timesteps, sigmas: how to sample instead, where the scheduler takes them.
            guidance_scale: classifier-free guidance; 1 is off. By default 3, or 1 for a model without a null condition, or what a
                student was trained for, mostly 1.
            num_images_per_prompt: images for each prompt or label.
            batch_size: number of images of an unconditional model (by default one for each seed).
            seeds: one for each image: the image is then a function of its seed, whatever the batch. Random by default.
            generator: instead of seeds, as diffusers has it: one, or a list with one for each image.
            latents: initial noise (B, C, h, w), instead of drawing it.
            eta: noise of DDIM-like schedulers, 0 to 1.
            guidance: steers the run, see `genkit.guidance`; or a function of images (B, 3, H, W) in [-1, 1] that returns a value
                (B,) for each, larger is better.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)`; may return changed "latents".
            callback_on_step_end_tensor_inputs: any of "latents", "x0", "eps", "energy".
            **conditioning: further inputs of the family's `condition`.

        Returns:
            `GuidedPipelineOutput`, or a tuple of its values with `return_dict=False`.

        Raises:
            ValueError: inputs that do not fit the model or each other.
            FloatingPointError: the run became NaN or infinite.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"Unknown output_type {output_type!r}. Use 'pil', 'np', 'pt' or 'latent'.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
        if unknown:
            raise ValueError(f"Unknown callback tensors {sorted(unknown)}. Known: {', '.join(CALLBACK_TENSORS)}.")
        student = self.student
        if num_inference_steps is None:
            num_inference_steps = 30 if student is None else student.default_steps
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be at least 1.")
        guidance = None if guidance is None else as_guidance(guidance)
        self._check_guidance(guidance)
        self._interrupt = False

        proof = Proof(self.host, known=self._audited)
        with proof, proof.step("condition", prompt_embeds is None):
            cond = self._condition(
                prompts=prompt, negative_prompts=negative_prompt, labels=class_labels,
                prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, **conditioning,
            )  # fmt: skip
        if cond is not None and num_images_per_prompt != 1:
            cond = cond.repeat(num_images_per_prompt)
        count = self._count(cond, batch_size, seeds, generator, latents)
        if cond is not None and len(cond) != count:
            if len(cond) != 1:
                raise ValueError(f"There are {len(cond)} prompts or labels for {count} images. Give one, or one for each.")
            cond = cond.repeat(count)
        guidance_scale = _free_guidance_scale(guidance_scale, cond, default=3.0 if student is None else student.guidance_scale)
        if seeds is None and generator is None and latents is None:
            seeds = torch.randint(2**31, (count,)).tolist()

        denoiser, scheduler = self.denoiser, self.host.scheduler
        if student is not None and height is None and width is None:
            height, width = student.height, student.width
        shape = denoiser.latent_shape(height, width) if latents is None else tuple(latents.shape[1:])
        device = denoiser.device
        if student is not None and timesteps is None and sigmas is None:
            set_levels(student, denoiser, scheduler, num_inference_steps, shape, device)
        else:
            denoiser.set_timesteps(scheduler, num_inference_steps, shape, device, timesteps=timesteps, sigmas=sigmas)
        x = self._initial(latents, (count, *shape), seeds, generator, device)
        if seeds is not None and generator is None:
            generator = noise.generators(seeds, noise.SAMPLER)

        energy: dict[str, Tensor] = {}
        with proof, self.host.progress_bar(total=len(scheduler.timesteps)) as bar:

            def on_step(state: State, prediction: Prediction, x_next: Tensor) -> Tensor | None:
                energy.update(state.log)
                bar.update()
                if callback_on_step_end is None:
                    return None
                values = {
                    "latents": lambda: x_next,
                    "x0": lambda: prediction.x0,
                    "eps": lambda: prediction.eps,
                    "energy": lambda: state.log,
                }
                tensors = {name: values[name]() for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, state.level.index, scheduler.timesteps[state.level.index], tensors)
                return None if changed is None else changed.get("latents")

            x = sample(
                denoiser, scheduler, x, cond, guidance=guidance, guidance_scale=guidance_scale, seeds=seeds,
                generator=generator, eta=eta, on_step=on_step, interrupted=lambda: self._interrupt,
            )  # fmt: skip
            with proof.step("decode", tuple(x.shape), output_type == "latent"):
                images = self._decode(x, output_type)
        self.attention = proof.to_dict()
        self.host.maybe_free_model_hooks()
        output = GuidedPipelineOutput(images=images, seeds=None if seeds is None else list(seeds), energy=energy)
        return output if return_dict else output.to_tuple()

    def _condition(self, **inputs: Any) -> Cond | None:
        """The family's conditioning from what was given; the family refuses what it does not take."""
        cond = self.denoiser.condition(**{name: value for name, value in inputs.items() if value is not None})
        return cond if cond.tensors else None

    def _count(self, cond: Cond | None, batch_size: int | None, seeds: Any, generator: Any, latents: Tensor | None) -> int:
        """Number of images; every input that implies one must agree."""
        counts = {
            "batch_size": batch_size,
            "seeds": None if seeds is None else len(seeds),
            "generators": len(generator) if isinstance(generator, list) else None,
            "latents": None if latents is None else len(latents),
            "prompts or labels": None if cond is None or len(cond) == 1 else len(cond),
        }
        given = {name: value for name, value in counts.items() if value is not None}
        if len(set(given.values())) > 1:
            listed = ", ".join(f"{value} {name}" for name, value in given.items())
            raise ValueError(f"The numbers of images disagree: {listed}.")
        count = next(iter(given.values()), 1)
        if count < 1:
            raise ValueError("There is nothing to generate: give at least one seed.")
        return count

    def _initial(self, latents: Tensor | None, shape: tuple[int, ...], seeds: Any, generator: Any, device: Any) -> Tensor:
        """Initial noise in the scheduler's variable, float32."""
        if latents is not None:
            if latents.shape != shape:
                raise ValueError(f"latents have shape {tuple(latents.shape)}, but {shape} is needed.")
            z = latents
        elif seeds is not None and generator is None:
            z = noise.normal(seeds, shape[1:])
        else:
            z = randn_tensor(shape, generator=generator, device=torch.device(device))
        return z.to(device=device, dtype=torch.float32) * getattr(self.host.scheduler, "init_noise_sigma", 1.0)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        return VaeImageProcessor(vae_scale_factor=1).postprocess(self.denoiser.decode(x).float(), output_type=output_type)

    def _check_guidance(self, guidance: Guidance | None) -> None:
        if guidance is None:
            return
        # Offload hooks swap weights between forward and backward, which breaks gradients silently.
        if _host.is_offloaded(self.host):
            raise ValueError(
                "Guidance needs gradients, which CPU offload breaks. Load the pipeline without enable_model_cpu_offload "
                "or enable_sequential_cpu_offload."
            )
        for part in guidance.leaves():
            part.check(self.host)


def _free_guidance_scale(scale: float | None, cond: Cond | None, default: float) -> float:
    """The scale to use: the default where none is given, and 1 where it cannot matter, which halves the work."""
    if cond is None or cond.null_tensors is None:
        return 1.0 if scale is None else scale
    same = all(torch.equal(value, cond.null_tensors[name]) for name, value in cond.tensors.items())
    return 1.0 if same else default if scale is None else scale
