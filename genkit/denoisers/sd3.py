"""Stable Diffusion 3 and 3.5: a transformer over image and text tokens, rectified flow, two CLIP encoders and T5.

Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024, arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from genkit.denoisers.base import accepts
from genkit.denoisers.shift import resolution_shift
from genkit.denoisers.text import TextDenoiser
from genkit.levels import Level


class StableDiffusion3Denoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P). Options: `clip_skip`, `max_sequence_length` (of T5)."""

    family = "Stable Diffusion 3"
    classes = ("StableDiffusion3Pipeline",)
    inputs = ("prompt_embeds", "pooled_prompt_embeds")
    tokenizers = ("tokenizer", "tokenizer_3")
    text_keys = "after"
    options = ("clip_skip", "max_sequence_length")

    def _schedule_arguments(self, scheduler: Any, latent_shape: Sequence[int]) -> dict[str, Any]:
        if not (scheduler.config.get("use_dynamic_shifting") and accepts(scheduler, "mu")):
            return {}
        patch = self.network.config.patch_size
        height, width = latent_shape[-2:]
        return {"mu": resolution_shift(scheduler.config, (height // patch) * (width // patch), max_shift=1.16)}

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        if negative:
            options = {k: v for k, v in options.items() if k != "clip_skip"}
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, **options
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(
            z,
            timestep=self._time(z, level),
            encoder_hidden_states=tensors["prompt_embeds"],
            pooled_projections=tensors["pooled_prompt_embeds"],
        ).sample
