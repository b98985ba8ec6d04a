"""Flux.1: a transformer over packed image tokens and T5 tokens, rectified flow, with or without distilled guidance.

The sample that everyone sees is (B, 16, h, w); packing 2x2 latents into a token of 64 happens around the network alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from genkit.denoisers.base import Cond, accepts
from genkit.denoisers.shift import resolution_shift
from genkit.denoisers.text import Prompts, TextDenoiser
from genkit.levels import Level


class FluxDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D) of T5, `pooled_prompt_embeds` (B, P) of CLIP, and `guidance` (B,) where it is distilled.

    `guidance_scale` of a call is true classifier-free guidance (the pipeline's `true_cfg_scale`); the scale that Flux.1-dev was
    distilled with is a part of the condition.
    """

    family = "Flux"
    classes = ("FluxPipeline",)
    inputs = ("prompt_embeds", "pooled_prompt_embeds")
    tokenizers = ("tokenizer_2",)
    text_keys = "before"

    def condition(
        self,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        *,
        distilled_guidance: float | None = None,
        **embeds_and_options: Any,
    ) -> Cond:
        """As `TextDenoiser.condition`.

        Args:
            distilled_guidance: what the pipeline calls `guidance_scale`, by default 3.5; about 1 to 10.

        Raises:
            ValueError: also for `distilled_guidance` where the network has none (Flux.1-schnell).
        """
        cond = super().condition(prompts, negative_prompts, **embeds_and_options)
        if not self.network.config.guidance_embeds:
            if distilled_guidance is not None:
                raise ValueError(f"distilled_guidance={distilled_guidance}, but this network has none. Leave it out.")
            return cond
        scale = 3.5 if distilled_guidance is None else float(distilled_guidance)
        guidance = {"guidance": torch.full((len(cond),), scale, device=self.device)}
        return Cond(cond.tensors | guidance, None if cond.null_tensors is None else cond.null_tensors | guidance)

    def set_timesteps(
        self,
        scheduler: Any,
        count: int,
        latent_shape: Sequence[int],
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """As in the base; by default `count` equal steps of sigma from 1, before the shift."""
        custom = timesteps is not None or sigmas is not None
        if not custom and accepts(scheduler, "sigmas") and not scheduler.config.get("use_flow_sigmas"):
            sigmas = np.linspace(1.0, 1 / count, count).tolist()
        super().set_timesteps(scheduler, count, latent_shape, device, timesteps, sigmas)

    def _schedule_arguments(self, scheduler: Any, latent_shape: Sequence[int]) -> dict[str, Any]:
        height, width = latent_shape[-2:]
        tokens = (height // 2) * (width // 2)
        return {"mu": resolution_shift(scheduler.config, tokens, max_shift=1.15)} if accepts(scheduler, "mu") else {}

    def _default_size(self) -> tuple[int, int]:
        return 128, 128  # the pipeline's own; the network's configuration has none

    def _channels(self) -> int:
        return self.network.config.in_channels // 4

    def _size_multiple(self) -> int:
        return 2

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        height, width = z.shape[-2] // 2, z.shape[-1] // 2
        output = self.network(
            pack(z),
            timestep=self._time(z, level) / 1000,
            guidance=tensors.get("guidance"),
            encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tensors["pooled_prompt_embeds"],
            txt_ids=z.new_zeros(tensors["prompt_embeds"].shape[1], 3),
            img_ids=_positions(height, width).to(z),
        ).sample
        return unpack(output, height)


def pack(x: Tensor) -> Tensor:
    """Latents (B, c, 2h, 2w) as tokens (B, h*w, 4c), the form in which the stock pipeline keeps them."""
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """Tokens (B, h*w, 4c) of h = `height` rows as latents (B, c, 2h, 2w)."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def _positions(height: int, width: int) -> Tensor:
    """(0, row, column) of each image token, (h*w, 3), for the rotary embedding; text tokens sit at the origin."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
