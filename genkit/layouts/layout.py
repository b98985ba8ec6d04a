"""A layout: the classes and boxes of a picture's objects, and the tensor that batches are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from genkit.errors import unknown

EMPTY = -1.0  # the class of a slot without an object


@dataclasses.dataclass(frozen=True)
class Layout:
    """Objects of one picture.

    Args:
        labels: K class names, or their numbers.
        boxes: K boxes x0, y0, x1, y1 from 0 to 1, in units of the picture.

    Raises:
        ValueError: numbers of labels and boxes that differ; a box outside the picture, inverted, empty or not finite.

    Example:
        >>> Layout(["seven", "two"], [(0.1, 0.1, 0.4, 0.5), (0.5, 0.5, 0.9, 0.9)])
    """

    labels: Sequence[str | int]
    boxes: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("boxes", self.boxes)):
            if isinstance(values, str) or not hasattr(values, "__len__"):
                raise ValueError(f"The {name} of a layout are {values!r:.80}. Give a list.")
        if len(self.labels) != len(self.boxes):
            raise ValueError(f"A layout has {len(self.labels)} labels and {len(self.boxes)} boxes. Give one box for each label.")
        for box in self.boxes:
            check_box(box)


def check_box(box: Sequence[float]) -> None:
    """Raise ValueError for a box that is not x0 < x1, y0 < y1 within 0 to 1."""
    try:
        if any(isinstance(value, str) for value in box):
            raise TypeError
        values = [float(value) for value in box]
    except (TypeError, OverflowError, ValueError):
        raise ValueError(f"The box {box!s:.80} is not four numbers. Give x0, y0, x1, y1 from 0 to 1.") from None
    shown = ", ".join(f"{value:g}" for value in values)
    if len(values) != 4:
        raise ValueError(f"The box ({shown}) has {len(values)} numbers. Give x0, y0, x1, y1.")
    x0, y0, x1, y1 = values
    # Written so that NaN fails.
    if not (0 <= x0 <= 1 and 0 <= y0 <= 1 and 0 <= x1 <= 1 and 0 <= y1 <= 1):
        raise ValueError(f"The box ({shown}) lies outside the picture. Give x0, y0, x1, y1 from 0 to 1.")
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"The box ({shown}) is inverted or empty. Give x0 < x1 and y0 < y1.")


def pack(layouts: Sequence[Layout], class_names: Sequence[str], slots: int) -> Tensor:
    """Layouts as one tensor (B, slots, 5): class number and box of each object, then empty slots of class -1.

    Raises:
        ValueError: no layouts, a class that is not among `class_names`, or more objects than slots.
    """
    if not layouts:
        raise ValueError("There are no layouts. Give at least one.")
    packed = torch.zeros(len(layouts), slots, 5)
    packed[..., 0] = EMPTY
    for row, layout in zip(packed, layouts, strict=True):
        if len(layout.labels) > slots:
            raise ValueError(f"A layout has {len(layout.labels)} objects, but the model takes at most {slots}. Leave some out.")
        for slot, label, box in zip(row, layout.labels, layout.boxes, strict=False):
            slot[0] = _class_number(label, class_names)
            slot[1:] = torch.as_tensor(box, dtype=torch.float32)
    return packed


def unpack(packed: Tensor, class_names: Sequence[str]) -> list[Layout]:
    """Layouts of a tensor (B, slots, 5), as `pack` makes it; empty slots are left out."""
    found = []
    for row in packed.cpu():
        present = row[row[:, 0] >= 0]
        found.append(Layout([class_names[int(label)] for label in present[:, 0].tolist()], present[:, 1:].tolist()))
    return found


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which places lie in boxes (K, 4): (K, height, width), bool."""
    x, y = ((torch.arange(count, device=boxes.device, dtype=boxes.dtype) + 0.5) / count for count in (width, height))
    columns = (x > boxes[:, :1]) & (x < boxes[:, 2:3])
    rows = (y > boxes[:, 1:2]) & (y < boxes[:, 3:])
    return rows[:, :, None] & columns[:, None, :]


def shuffled(layouts: Tensor, generator: torch.Generator) -> Tensor:
    """Packed layouts (B, N, 5) with the slots of each in random order."""
    order = torch.rand(layouts.shape[:2], generator=generator).argsort(1)
    return layouts.gather(1, order[..., None].expand(-1, -1, 5))


def _class_number(label: str | int, class_names: Sequence[str]) -> int:
    if isinstance(label, str):
        if label not in class_names:
            raise unknown("class", label, class_names)
        return list(class_names).index(label)
    if isinstance(label, bool) or not isinstance(label, SupportsIndex) or not 0 <= int(label) < len(class_names):
        raise ValueError(f"There is no class {label!r:.80}. Give a number from 0 to {len(class_names) - 1}, or a name.")
    return int(label)
