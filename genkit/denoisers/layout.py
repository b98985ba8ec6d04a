"""Layout-to-image: a U-Net that reads the classes and boxes of objects by cross-attention; see `genkit.zoo.training.scenes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.errors import unknown
from genkit.layouts.grounding import Grounding
from genkit.layouts.layout import Layout, pack
from genkit.levels import Level


class LayoutDenoiser(Denoiser):
    """Tensors: `layout_embeds` (B, L, D), what the layout encoder makes of a layout; the null condition is the empty layout."""

    family = "layout-to-image"
    classes = ("LayoutToImagePipeline",)
    inputs = ("layout_embeds",)

    def condition(
        self, layouts: Layout | Sequence[Layout] | Tensor | None = None, layout_embeds: Tensor | None = None, **extra: Any
    ) -> Cond:
        """Conditioning of a batch.

        Args:
            layouts: one for each of B samples, or packed (B, slots, 5), see `genkit.layouts.pack`.
            layout_embeds: (B, L, D) instead, as the layout encoder makes them.

        Raises:
            ValueError: neither or both, a class that the model lacks, or more objects than it has slots.
        """
        self._refuse(extra, "layouts", "layout_embeds")
        if (layouts is None) == (layout_embeds is None):
            raise ValueError("This model is conditioned on a layout. Give layouts, or layout_embeds.")
        encoder = self.pipe.layout_encoder
        if layout_embeds is None:
            if not isinstance(layouts, Tensor):
                listed = [layouts] if isinstance(layouts, Layout) else list(layouts or [])
                layouts = pack(listed, encoder.config.class_names, encoder.config.slots)
            with torch.no_grad():
                layout_embeds = encoder(layouts.to(self.device))
        with torch.no_grad():
            null = encoder.null(len(layout_embeds))
        return Cond({"layout_embeds": layout_embeds}, {"layout_embeds": null})

    def grounding(self, class_names: Sequence[str] | None = None) -> Grounding:
        """Layouts of some of the model's classes."""
        encoder = self.pipe.layout_encoder
        if encoder.config.codec != "gligen":
            raise ValueError(
                f"The boxes of the codec {encoder.config.codec!r} are not continuous, so they have no gradient. Use a model with "
                "'gligen', or genkit.inversion.DiscreteInverter."
            )
        known = list(encoder.config.class_names)
        names = known if class_names is None else list(class_names)
        for name in names:
            if name not in known:
                raise unknown("class", name, known)
        numbers = torch.tensor([known.index(name) for name in names])

        def condition(packed: Tensor) -> Cond:
            label = packed[..., 0]
            own = numbers.to(packed)[label.long().clamp(min=0)]
            packed = torch.cat([torch.where(label >= 0, own, label)[..., None], packed[..., 1:]], dim=-1)
            return Cond({"layout_embeds": encoder(packed)})

        return Grounding(names, encoder.config.slots, condition)

    def _channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def _size_multiple(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(with_coordinates(z), self._time(z, level), encoder_hidden_states=tensors["layout_embeds"]).sample


class LayoutPriorDenoiser(Denoiser):
    """Unconditional, of layouts (B, N, K + 5) themselves; see `genkit.layouts.prior`."""

    family = "layout prior"
    classes = ("LayoutPriorPipeline",)

    def condition(self, **extra: Any) -> Cond:
        """There is none."""
        self._refuse(extra)
        return Cond({})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Slots and numbers of a slot; layouts have no size in pixels."""
        config = self.network.config
        return (config.slots, len(config.class_names) + 5)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        return self.network(z, self._time(z, level))


def with_coordinates(x: Tensor) -> Tensor:
    """A sample (B, C, h, w) with the coordinates of its places behind its channels, -1 to 1 (B, C + 2, h, w)."""
    axes = [torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[-2:]]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.cat([x, torch.stack([columns, rows]).expand(len(x), -1, -1, -1)], dim=1)
