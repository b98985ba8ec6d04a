"""DiT: a class-conditional latent transformer (Peebles & Xie 2023, arXiv 2212.09748).

The published weights came from the original code, whose timestep embedding has the frequencies 10000^(-i/128), i = 0..127.
diffusers evaluates them with 10000^(-i/127) (`downscale_freq_shift=1`), so the network is told a slightly wrong time, more so at
high noise. The adapter puts that right by default: see `use_original_time_embedding`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.labels import Labels, label_ids
from genkit.levels import Level


def use_original_time_embedding(transformer: Any, original: bool = True) -> None:
    """Switch the frequencies of every block of a `DiTTransformer2DModel`, in place.

    Args:
        original: True for 10000^(-i/128), as in the original code and hence in `facebook/DiT-XL-2-256` and `-512`; False for
            diffusers' 10000^(-i/127), right for a network that was trained in diffusers.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0 if original else 1


class DiTDenoiser(Denoiser):
    """Tensors: `class_labels` (B,); the null class is `num_embeds_ada_norm`.

    Args:
        original_time_embedding: the frequencies that the network was trained with, see `use_original_time_embedding`. It is set on
            the pipeline's own transformer, so the stock `DiTPipeline` call changes with it; False gives (and restores) exactly
            what stock diffusers computes.
    """

    family = "DiT"
    classes = ("DiTPipeline",)
    inputs = ("class_labels",)

    def __init__(self, pipe: Any, original_time_embedding: bool = True) -> None:
        super().__init__(pipe)
        self.num_classes: int = pipe.transformer.config.num_embeds_ada_norm
        use_original_time_embedding(pipe.transformer, original_time_embedding)

    def condition(self, labels: Labels | None = None, **extra: Any) -> Cond:
        """Conditioning of a batch.

        Args:
            labels: class of each of B samples: a number, or a name of `pipe.labels`.

        Raises:
            ValueError: no labels, one out of range, or an unknown name.
        """
        self._refuse(extra, "labels")
        if labels is None:
            raise ValueError(f"DiT is conditioned on a class. Give labels from 0 to {self.num_classes - 1}, or names.")
        ids = label_ids(labels, self.num_classes, self.pipe.labels, self.device)
        return Cond({"class_labels": ids}, {"class_labels": torch.full_like(ids, self.num_classes)})

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, timestep=self._time(z, level), class_labels=tensors["class_labels"]).sample
