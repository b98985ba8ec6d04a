"""Layout-to-image: a U-Net that reads the classes and boxes of objects by cross-attention; see `genkit.zoo.training.scenes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.errors import unknown
from genkit.layouts.encoder import painted
from genkit.layouts.grounding import Grounding
from genkit.layouts.layout import Layout, pack
from genkit.levels import Level


class LayoutDenoiser(Denoiser):
    """Tensors: `layout_embeds` (B, L, D), what the layout encoder makes of a layout, and, where it paints, `layout_objects`
    (B, N, K) and `layout_known` (B, 4). The null condition is a layout of which nothing is known; without paint, the empty one."""

    family = "layout-to-image"
    classes = ("LayoutToImagePipeline",)
    inputs = ("layout_embeds",)

    def condition(
        self, layouts: Layout | Sequence[Layout] | Tensor | None = None, layout_embeds: Tensor | None = None, **extra: Any
    ) -> Cond:
        """Conditioning of a batch.

        Args:
            layouts: one for each of B samples, or packed (B, slots, 5), see `genkit.layouts.pack`.
            layout_embeds: (B, L, D) instead, as a layout encoder without paint makes them.

        Raises:
            ValueError: neither or both, a class that the model lacks, more objects than it has slots, or embeddings where the model
                is told more.
        """
        self._refuse(extra, "layouts", "layout_embeds")
        if (layouts is None) == (layout_embeds is None):
            raise ValueError("This model is conditioned on a layout. Give layouts, or layout_embeds.")
        encoder = self.pipe.layout_encoder
        if layout_embeds is not None:
            if encoder.config.paint:
                raise ValueError("This model paints its layouts, too: layout_embeds do not tell all. Give layouts.")
            told = {"layout_embeds": layout_embeds}
        else:
            if not isinstance(layouts, Tensor):
                listed = [layouts] if isinstance(layouts, Layout) else list(layouts or [])
                layouts = pack(listed, encoder.config.class_names, encoder.config.slots)
            with torch.no_grad():
                told = encoder(layouts.to(self.device))
        with torch.no_grad():
            return Cond(told, encoder.null(len(told["layout_embeds"])))

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
            return Cond(encoder(packed))

        return Grounding(names, encoder.config.slots, condition, Cond(encoder.null(1)) if encoder.config.paint else None)

    def _channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def _size_multiple(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def _forward(self, z: Tensor, level: Level, tensors: dict[str, Tensor]) -> Tensor:
        x = network_input(z, tensors)
        return self.network(x, self._time(z, level), encoder_hidden_states=tensors["layout_embeds"]).sample


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


def network_input(x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """What the U-Net takes (B, C + 2 + K, h, w): a sample (B, C, h, w), coordinates from -1 to 1, the painted layout if any."""
    axes = [torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[-2:]]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    channels = [x, torch.stack([columns, rows]).expand(len(x), -1, -1, -1)]
    if "layout_objects" in tensors:
        channels.append(painted(tensors["layout_objects"].to(x), tensors["layout_known"].to(x), *x.shape[-2:]))
    return torch.cat(channels, dim=1)
