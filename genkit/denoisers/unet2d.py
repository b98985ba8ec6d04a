"""Pixel-space UNets, unconditional or conditioned on a class (Ho et al. 2020, arXiv 2006.11239).

`DDPMPipeline(unet, scheduler)` wraps any `UNet2DModel` with any scheduler, so every such network has an adapter.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.labels import Labels, label_ids
from genkit.levels import Level


class UNet2DDenoiser(Denoiser):
    """Tensors: `class_labels` (B,) for a network with a class embedding, otherwise none."""

    family = "UNet2D"
    classes = ("DDPMPipeline", "DDIMPipeline")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.num_classes: int | None = pipe.unet.config.num_class_embeds

    def condition(self, labels: Labels | None = None, null_label: int | None = None, **extra: Any) -> Cond:
        """Conditioning of a batch; empty for an unconditional network.

        Args:
            labels: class of each of B samples, from 0.
            null_label: the class that stands for none, of a network trained with label dropout.

        Raises:
            ValueError: labels for an unconditional network, or none for a conditional one; a label out of range.
        """
        self._refuse(extra, *(() if self.num_classes is None else ("labels", "null_label")))
        if self.num_classes is None:
            self._refuse({"labels": labels, "null_label": null_label})
            return Cond({})
        if labels is None:
            raise ValueError(f"This network is conditioned on a class. Give labels from 0 to {self.num_classes - 1}.")
        ids = label_ids(labels, self.num_classes, device=self.device)
        if null_label is None:
            return Cond({"class_labels": ids})
        null = label_ids([null_label], self.num_classes, device=self.device)
        return Cond({"class_labels": ids}, {"class_labels": null.expand(len(ids))})

    def _size_multiple(self) -> int:
        # Skip connections meet only where every halving is exact.
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, self._time(z, level), class_labels=tensors.get("class_labels")).sample
