"""A point-cloud diffusion model for assembly: as a source of templates, and as the denoiser of the assembly itself.

    templates    clouds of the model's prior, by DPM-Solver++ of second order from noise (Lu et al. 2022, arXiv 2211.01095)
    targets      y -> D(y): noise the assembly to a level h = sigma / alpha, denoise, back              (`couplings.DenoisedTarget`)

The model knows clouds of unit standard deviation, or of one area; c and m, the scale and centre of a template in its lengths, say
how an assembly in units looks to it: (y - m) c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit import noise
from genkit.assembly.couplings import DenoisedTarget, Target
from genkit.assembly.descriptors import part_features
from genkit.assembly.parts import PartSet
from genkit.errors import unknown
from genkit.levels import Level, kind_of
from genkit.prediction import Prediction

SURPRISED_AT = 0.1  # noise level h


class PointModel:
    """A denoiser of clouds and its scheduler.

    Args:
        denoiser: `forward(sample (B, N, 3), timestep (B,), class_labels (B,)) -> .sample`; its config has `categories`. One with
            latents has `draw(seeds)` and takes them as `context`; one whose config has `part_features` takes those as `parts`.
        scheduler: of the DDPM family (it has `alphas_cumprod`).
        parts: that the clouds shall be made of; they tell the scale of a model whose clouds have one area.
        tell: tell them to a network that takes them.

    Raises:
        ValueError: a scheduler of another family.

    Example:
        >>> clouds = PointModel(denoiser, scheduler).generate(8, "chair", points=2048)      # (8, 2048, 3)
    """

    def __init__(self, denoiser: Any, scheduler: Any, parts: PartSet | None = None, *, tell: bool = True) -> None:
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod. Use DDPMScheduler or DDIMScheduler.")
        self.denoiser, self.scheduler = denoiser, scheduler
        takes = tell and getattr(denoiser.config, "part_features", 0) > 0
        self.parts = part_features(parts.points, parts.areas) if takes and parts is not None else None
        area = getattr(denoiser.config, "surface_area", None)
        # c, where the parts tell it.
        self.scale = None if parts is None or area is None else math.sqrt(area / float(parts.areas.sum()))
        self.ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt()

    def label(self, category: str | int | None) -> int | None:
        """The number of a category; None for a model without, or for no category.

        Raises:
            ValueError: a category that the model lacks.
        """
        known = list(getattr(self.denoiser.config, "categories", None) or [])
        if category is None or not known:
            return None
        if isinstance(category, int):
            if not 0 <= category < len(known):
                raise ValueError(f"Category {category} is not among the model's {len(known)}: {', '.join(known)}.")
            return category
        if category not in known:
            raise unknown("category", category, known)
        return known.index(category)

    def context(self, seeds: Sequence[int]) -> Tensor | None:
        """Latents of shapes, one for each seed, for a network that is told them; else None."""
        return self.denoiser.draw(seeds) if hasattr(self.denoiser, "draw") else None

    def raw(self, x: Tensor, step: int, label: int | None, context: Tensor | None = None) -> Tensor:
        """What the network says (B, N, 3) of x (B, N, 3) at a step of its training schedule."""
        device = next(self.denoiser.parameters()).device
        times = torch.full((len(x),), step, device=device)
        labels = None if label is None else torch.full((len(x),), label, device=device)
        told: dict[str, Tensor] = {} if context is None else {"context": context}
        if self.parts is not None:
            told["parts"] = self.parts.expand(len(x), -1, -1).to(device)
        return self.denoiser(x.float().to(device), times, class_labels=labels, **told).sample.to(x)

    def eps(self, x: Tensor, step: int, label: int | None, context: Tensor | None = None) -> Tensor:
        """The noise (B, N, 3) in x."""
        abar = float(self.scheduler.alphas_cumprod[step])
        level = Level(abar**0.5, (1 - abar) ** 0.5, step)
        return Prediction(x, level, self.raw(x, step, label, context), kind_of(self.scheduler)).eps

    def nearest(self, h: float) -> int:
        """The step whose sigma / alpha is nearest to h."""
        return int((self.ratios.log() - math.log(h)).abs().argmin())

    @torch.no_grad()
    def generate(
        self, count: int, category: str | int | None = None, *, points: int = 2048, steps: int = 20, seed: int = 0,
        batch_size: int = 8,
    ) -> Tensor:  # fmt: skip
        """Clouds (count, points, 3) of a category; cloud i is a function of (seed, i), whatever `count` and `batch_size` are.

        Raises:
            FloatingPointError: the model gave values that are not finite.
        """
        label, clouds = self.label(category), []
        for rows in torch.arange(count).split(batch_size):
            seeds = [noise.mix(seed, int(i)) for i in rows]
            clouds.append(self._denoised(noise.normal(seeds, (points, 3)), label, self.context(seeds), steps, None))
        return torch.cat(clouds)

    @torch.no_grad()
    def renewed(self, clouds: Tensor, h: float, category: str | int | None = None, *, steps: int = 30, seed: int = 0) -> Tensor:
        """What the model makes of clouds (B, N, 3) of unit standard deviation that are noised to the level h (SDEdit).

        Args:
            steps: that a whole denoising would take.
            seed: of the noise, the same for each cloud.

        Raises:
            FloatingPointError: the model gave values that are not finite.
        """
        return self._denoised(clouds, self.label(category), self.context([seed] * len(clouds)), steps, (h, seed))

    def _denoised(
        self, x: Tensor, label: int | None, context: Tensor | None, steps: int, start: tuple[float, int] | None
    ) -> Tensor:
        """By DPM-Solver++, from noise x, or from clouds x that are noised to a level first, with a seed."""
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps
        if start is not None:
            h, seed = start
            first = int((timesteps - self.nearest(h)).abs().argmin())
            timesteps = timesteps[first:]
            x = scheduler.add_noise(x, noise.normal([seed], tuple(x.shape[1:])).to(x).expand_as(x), timesteps[:1])
        for t in timesteps.tolist():
            x = scheduler.step(self.raw(x, t, label, context), t, x).prev_sample
        if not torch.isfinite(x).all():
            raise FloatingPointError("The model's clouds are not finite. Its weights may be damaged.")
        return x

    @torch.no_grad()
    def surprise(self, clouds: Tensor, category: str | int | None = None, *, batch_size: int = 16) -> float:
        """Mean squared error of the predicted noise of clouds (B, N, 3), at low noise: how rough the model finds them.

        The noise of cloud i is the same at each call, so differences between sets of clouds are not those of the noise.
        """
        label, step = self.label(category), self.nearest(SURPRISED_AT)
        abar = self.scheduler.alphas_cumprod[step]
        errors = []
        for rows in torch.arange(len(clouds)).split(batch_size):
            eps = noise.normal(rows.tolist(), tuple(clouds.shape[1:])).to(clouds)
            noisy = abar.sqrt() * clouds[rows] + (1 - abar).sqrt() * eps
            errors.append((self.eps(noisy, step, label, self.context([0] * len(rows))) - eps).square().mean((1, 2)))
        return float(torch.cat(errors).mean())

    def target(self, category: str | int | None, scale: float, centre: Tensor, seeds: list[int]) -> Target:
        """Targets of assemblies in units, one seed of noise (and of a latent) for each; fresh noise at each call."""
        label, calls, context = self.label(category), [0], self.context(seeds)

        def fresh(shape: torch.Size) -> Tensor:
            calls[0] += 1
            return noise.normal([noise.mix(seed, calls[0]) for seed in seeds], shape[1:])

        def place(y: Tensor, h: float) -> Tensor:
            step = self.nearest(h)
            denoised = DenoisedTarget(lambda x, _: self.eps(x, step, label, context), fresh)
            return denoised((y - centre) * scale, float(self.ratios[step])) / scale + centre

        return place
