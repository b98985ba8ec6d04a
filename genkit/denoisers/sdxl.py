"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, and micro-conditioning on size and crop.

Podell et al., SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, 2023, arXiv 2307.01952.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Cond
from genkit.denoisers.text import Prompts, TextDenoiser
from genkit.levels import Level

Size = tuple[int, int]


class StableDiffusionXLDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P), and `time_ids` (B, 6) if sizes or crops were given."""

    family = "Stable Diffusion XL"
    classes = ("StableDiffusionXLPipeline",)
    inputs = ("prompt_embeds", "pooled_prompt_embeds")
    cross_attended = ("prompt_embeds",)
    options = ("clip_skip",)

    def condition(
        self,
        prompts: Prompts | None = None,
        negative_prompts: Prompts | None = None,
        *,
        original_size: Size | None = None,
        crops_coords_top_left: Size | None = None,
        target_size: Size | None = None,
        **embeds_and_options: Any,
    ) -> Cond:
        """As `TextDenoiser.condition`, with SDXL's micro-conditioning, the same for the prompts and the null condition.

        Args:
            original_size, target_size: (height, width) in pixels; each is the other by default, and both the size of the sample.
            crops_coords_top_left: (top, left) in pixels, by default (0, 0).
        """
        cond = super().condition(prompts, negative_prompts, **embeds_and_options)
        if original_size is None and target_size is None and crops_coords_top_left is None:
            return cond
        own = self._pixels(*self.latent_shape(None, None)[1:])
        sizes = (original_size or target_size or own, crops_coords_top_left or (0, 0), target_size or original_size or own)
        ids = {"time_ids": self._time_ids(*sizes).repeat(len(cond), 1)}
        return Cond(cond.tensors | ids, None if cond.null_tensors is None else cond.null_tensors | ids)

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        options = {} if negative else options
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _null(self, tensors: dict[str, Tensor], prompts: list[str] | None, options: dict[str, Any]) -> dict[str, Tensor] | None:
        if prompts is None and self.pipe.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(v) for name, v in tensors.items()}
        return super()._null(tensors, prompts, options)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        ids = tensors.get("time_ids")
        if ids is None:
            size = self._pixels(*z.shape[-2:])
            ids = self._time_ids(size, (0, 0), size).to(z).expand(len(z), -1)
        added = {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": ids}
        t = self._time(z, level)
        return self.network(z, t, encoder_hidden_states=tensors["prompt_embeds"], added_cond_kwargs=added).sample

    def _pixels(self, height: int, width: int) -> Size:
        return height * self.factor, width * self.factor

    def _time_ids(self, original: Size, crop: Size, target: Size) -> Tensor:
        return torch.tensor([[*original, *crop, *target]], dtype=torch.float32, device=self.device)
