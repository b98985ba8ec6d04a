"""PixArt-alpha and PixArt-sigma: a DiT with cross-attention to T5 tokens and a learned variance.

Chen et al. 2023, arXiv 2310.00426 (alpha), and 2024, arXiv 2403.04692 (sigma).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genkit.denoisers.text import TextDenoiser
from genkit.levels import Level


class PixArtDenoiser(TextDenoiser):
    """Tensors: `prompt_embeds` (B, L, D), `prompt_attention_mask` (B, L). Options: `max_sequence_length`, `clean_caption`.

    The 1024-pixel alpha network is also told resolution and aspect ratio: those of the sample.
    """

    family = "PixArt"
    classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    inputs = cross_attended = ("prompt_embeds", "prompt_attention_mask")
    options = ("max_sequence_length", "clean_caption")

    def _encode(self, prompts: list[str], negative: bool, options: dict[str, Any]) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipe.encode_prompt(prompts, False, device=self.device, **options)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _spoken(self, prompt: str, tokenizer: Any) -> str:
        return prompt.lower().strip()

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(
            z,
            timestep=self._time(z, level),
            encoder_hidden_states=tensors["prompt_embeds"],
            encoder_attention_mask=tensors["prompt_attention_mask"],
            added_cond_kwargs=self._size(z),
        ).sample

    def _size(self, z: Tensor) -> dict[str, Tensor | None]:
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.factor for side in z.shape[-2:])
        resolution = z.new_tensor([[height, width]]).expand(len(z), -1)
        return {"resolution": resolution, "aspect_ratio": z.new_tensor([[height / width]]).expand(len(z), -1)}
