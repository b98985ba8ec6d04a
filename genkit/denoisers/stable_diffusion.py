"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention to the tokens of a CLIP text encoder.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2022, arXiv 2112.10752.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from genkit.denoisers.text import TextDenoiser
from genkit.levels import Level


class StableDiffusionDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D).

    `clip_skip` is no option here: the pipeline's own fails with transformers 5. Pass `prompt_embeds` instead.
    """

    family = "Stable Diffusion"
    classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    inputs: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    cross_attended: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    options = ()

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, self._time(z, level), encoder_hidden_states=tensors["prompt_embeds"]).sample
