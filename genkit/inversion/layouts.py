"""Slots of layout-to-image models: what is where in a picture.

    codec      slots of N objects                                    free numbers
    tokens     3 N: class, top-left corner, bottom-right corner      none
    gligen     N: class                                              (N, 5): presence and box, from 0 to 1

Of "tokens", class and corners are rows of one table (`genkit.layouts.encoder`), of which each slot may hold its own part or the
last row, which stands for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.inversion.slots import Free, Slots
from genkit.layouts.layout import Layout, pack


class LayoutSlots(Slots):
    """The layout that a layout-to-image model is conditioned on.

    Args:
        denoiser: of a `LayoutToImagePipeline`.

    Raises:
        ValueError: another model.

    Example:
        >>> slots = LayoutSlots(Denoiser.of(pipe))
        >>> found = DiscreteInverter(slots.denoiser, slots, search=[Descent(restarts=4), Leaps(first=0)]).fit(x0)
        >>> slots.layout(found[0].rows, found[0].free)
    """

    def __init__(self, denoiser: Denoiser) -> None:
        encoder = getattr(denoiser.pipe, "layout_encoder", None)
        if encoder is None:
            raise ValueError(f"{denoiser.family} has no layout condition. Use a layout-to-image model, such as 'scenes'.")
        self.denoiser, self.codec, self.names = denoiser, encoder.embedder, list(encoder.config.class_names)
        self.objects: int = encoder.config.slots
        table = self.codec.table.weight.detach().float()
        if encoder.config.codec == "gligen":
            super().__init__(table, torch.ones(self.objects, len(table), dtype=torch.bool), free=Free((self.objects, 5)))
            return
        rows = torch.arange(len(table))
        none = rows == len(table) - 1
        kinds = torch.stack([(rows < limit) | none for limit in (len(self.names), self.codec.side**2, self.codec.side**2)])
        super().__init__(table, kinds.repeat(self.objects, 1))

    @contextmanager
    def condition(self, rows: Tensor, offset: Tensor, free: Tensor | None) -> Iterator[Cond]:
        dtype = self.codec.table.weight.dtype
        tokens = (self.table[rows] + offset).to(dtype)
        embeds = (
            self.codec.encode(tokens)
            if free is None
            else self.codec.encode(tokens, free[..., 1:].to(dtype), free[..., 0].to(dtype))
        )
        yield Cond({"layout_embeds": embeds})

    def encode(self, layouts: Sequence[Layout]) -> tuple[Tensor, Tensor | None]:
        """Rows (B, S), and free numbers (B, N, 5) or None, of layouts.

        Raises:
            ValueError: a class that the model lacks, or more objects than slots.
        """
        packed = pack(layouts, self.names, self.objects).to(self.table.device)
        if self.free is None:
            return self.codec.ids(packed), None
        present = (packed[..., :1] >= 0).to(packed)
        return packed[..., 0].long().clamp(min=0), torch.cat([present, packed[..., 1:]], dim=-1)

    def layout(self, rows: Tensor, free: Tensor | None = None) -> Layout:
        """The layout of rows (S,) and free numbers (N, 5); objects without a class or a box that is one are left out."""
        rows = self.check(rows).cpu()
        if free is None:
            none, side = len(self.table) - 1, self.codec.side
            classes, corners = rows.view(-1, 3)[:, 0], rows.view(-1, 3)[:, 1:]
            boxes = torch.stack([corners % side, corners // side], dim=-1).flatten(1) / (side - 1)
            present = (rows.view(-1, 3) != none).all(1)
        else:
            classes, boxes, present = rows, free.cpu()[:, 1:].clamp(0, 1), free.cpu()[:, 0] > 0.5
        whole = present & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
        return Layout([self.names[c] for c in classes[whole].tolist()], boxes[whole].tolist())
