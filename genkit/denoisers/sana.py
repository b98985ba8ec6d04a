"""Sana: a linear-attention transformer on 32-fold compressed latents, rectified flow, a Gemma text encoder.

Xie et al., SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, 2024, arXiv 2410.10629.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from genkit.denoisers.text import TextDenoiser
from genkit.levels import Level


class SanaDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D), `prompt_attention_mask` (B, L).

    Options: `max_sequence_length`, `clean_caption`, and `complex_human_instruction`: the lines in front of each prompt (not of the
    negative ones), by default the pipeline's own, [] for none.
    """

    family = "Sana"
    classes = ("SanaPipeline",)
    inputs = cross_attended = ("prompt_embeds", "prompt_attention_mask")
    tokenizers = ()  # it cuts the instruction in front of a prompt away after encoding
    options = ("max_sequence_length", "clean_caption", "complex_human_instruction")

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        # The pipeline puts its default instruction in front of prompts in `__call__`, not in `encode_prompt`.
        default = inspect.signature(self.pipe.__call__).parameters["complex_human_instruction"].default
        instruction = None if negative else options.get("complex_human_instruction", default)
        options = options | {"complex_human_instruction": instruction}
        embeds, mask, _, _ = self.pipe.encode_prompt(prompts, False, device=self.device, **options)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(
            z,
            timestep=self._time(z, level) * self.network.config.timestep_scale,
            encoder_hidden_states=tensors["prompt_embeds"],
            encoder_attention_mask=tensors["prompt_attention_mask"],
        ).sample
