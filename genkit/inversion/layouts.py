"""Slots of layout-to-image models: what is where in a picture.

    codec      slots of N objects                                    free numbers
    tokens     3 N: class, top-left corner, bottom-right corner      none
    gligen     N: class                                              (N, 4): boxes x0, y0, x1, y1 from 0 to 1

The vocabulary has a last row that stands for nothing. Of "tokens", class and corners are rows of one table
(`genkit.layouts.encoder`), of which each slot may hold its own part or the last row. Of "gligen", rows are the classes' embeddings
with one coordinate more, which tells whether there is an object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.inversion.inverter import DiscreteInverter
from genkit.inversion.slots import Free, Slots
from genkit.layouts.layout import EMPTY, Layout, pack, unpack


class LayoutSlots(Slots):
    """The layout that a layout-to-image model is conditioned on.

    Args:
        denoiser: of a `LayoutToImagePipeline`.

    Raises:
        ValueError: another model.

    Example:
        >>> slots = LayoutSlots(Denoiser.of(pipe))
        >>> refine = Descent(optimiser=Optimiser(lr=0.0, free_lr=0.01), stop=Stop(patience=None))  # of "gligen"
        >>> found = DiscreteInverter(slots.denoiser, slots, search=[Descent(restarts=4), Leaps(first=0), refine]).fit(x0)
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
            # As far from the classes as they are from each other.
            self._present = float(table.var(0, correction=0).sum().sqrt()) or 1.0
            table = torch.cat([table, table.mean(0, keepdim=True)])
            present = torch.full_like(table[:, :1], self._present)
            present[-1] = 0
            everything = torch.ones(self.objects, len(table), dtype=torch.bool)
            super().__init__(torch.cat([table, present], dim=1), everything, free=Free((self.objects, 4)))
            return
        rows = torch.arange(len(table))
        none = rows == len(table) - 1
        kinds = torch.stack([(rows < limit) | none for limit in (len(self.names), self.codec.side**2, self.codec.side**2)])
        super().__init__(table, kinds.repeat(self.objects, 1))

    @property
    def nothing(self) -> int:
        """The row that stands for no object."""
        return len(self.table) - 1

    @contextmanager
    def condition(self, rows: Tensor, offset: Tensor, free: Tensor | None) -> Iterator[Cond]:
        dtype, tokens = self.codec.table.weight.dtype, self.table[rows] + offset
        if free is None:
            told = self.codec.encode(tokens.to(dtype))
        else:
            present = tokens[..., -1] / self._present
            told = self.codec.encode(tokens[..., :-1].to(dtype), free.to(dtype), present.to(dtype))
        yield Cond(told)

    def scattered(self, count: int, generator: torch.Generator) -> Tensor | None:
        numbers = super().scattered(count, generator)
        if numbers is None:
            return None
        corners = numbers.unflatten(-1, (2, 2)).sort(dim=-2).values  # x0 < x1 and y0 < y1
        return corners.flatten(-2)

    def encode(self, layouts: Sequence[Layout]) -> tuple[Tensor, Tensor | None]:
        """Rows (B, S), and boxes (B, N, 4) or None, of layouts.

        Raises:
            ValueError: a class that the model lacks, or more objects than slots.
        """
        packed = pack(layouts, self.names, self.objects).to(self.table.device)
        if self.free is None:
            return self.codec.ids(packed), None
        classes = packed[..., 0].long()
        return classes.where(classes >= 0, self.nothing), packed[..., 1:]

    def packed(self, rows: Tensor, free: Tensor | None = None) -> Tensor:
        """Rows (B, S) and boxes (B, N, 4) as a tensor (B, N, 5), see `genkit.layouts.pack`; what has no box is no object."""
        rows = self.check(rows).cpu()
        if free is None:
            rows, side = rows.unflatten(1, (self.objects, 3)), self.codec.side
            corners, present = rows[..., 1:], (rows != self.nothing).all(-1)
            boxes = torch.stack([corners % side, corners // side], dim=-1).flatten(-2) / (side - 1)
            classes = rows[..., 0]
        else:
            classes, boxes, present = rows, free.detach().cpu().clamp(0, 1), rows != self.nothing
        whole = present & (boxes[..., :2] < boxes[..., 2:]).all(-1)
        objects = torch.cat([classes[..., None].float(), boxes.float()], dim=-1)
        return objects.where(whole[..., None], torch.tensor([EMPTY, 0, 0, 0, 0]))

    def layout(self, rows: Tensor, free: Tensor | None = None) -> Layout:
        """The layout of rows (S,) and boxes (N, 4)."""
        return unpack(self.packed(rows[None], None if free is None else free[None]), self.names)[0]

    def without(self, rows: Tensor) -> Tensor:
        """Rows (S,) as (N, S), each without one of the objects."""
        kinds = len(self) // self.objects
        return rows.where(~torch.eye(self.objects, dtype=torch.bool, device=rows.device).repeat_interleave(kinds, 1), self.nothing)


def leave_one_out(inverter: DiscreteInverter, x0: Tensor, rows: Tensor, free: Tensor | None = None) -> Tensor:
    """By how many nats each object lowers the sum of the terms (N,): the log of its posterior odds, all others as they are.

    Args:
        inverter: of `LayoutSlots`.
        x0: a clean sample (...).
        rows, free: its layout (S,) and (N, 4).

    Example:
        >>> leave_one_out(inverter, x0[0], found[0].rows, found[0].free)
    """
    slots = inverter.slots
    if not isinstance(slots, LayoutSlots):
        raise ValueError(f"{type(slots).__name__} has no objects that could be left out. Use LayoutSlots.")
    rows = slots.check(rows)
    tried = torch.cat([rows[None], slots.without(rows)])
    boxes = None if free is None else free.expand(len(tried), *free.shape)
    nats = inverter.score(x0.expand(len(tried), *x0.shape), tried, boxes).mean(1)
    return nats[1:] - nats[0]
