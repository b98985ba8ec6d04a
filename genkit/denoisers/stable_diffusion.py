"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention to the tokens of a CLIP text encoder.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv 2112.10752.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genkit.denoisers.text import TextDenoiser
from genkit.levels import Level


class StableDiffusionDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D). Option: `clip_skip`, for the prompts only, as in the pipeline."""

    family = "Stable Diffusion"
    classes = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    inputs = ("prompt_embeds",)
    options = ("clip_skip",)

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        options = {} if negative else options
        return {"prompt_embeds": self.pipe.encode_prompt(prompts, self.device, 1, False, **options)[0]}

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, self._time(z, level), encoder_hidden_states=tensors["prompt_embeds"]).sample
