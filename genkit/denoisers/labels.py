"""Class labels, as numbers or names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Labels = int | str | Sequence[int | str] | Tensor


def label_ids(labels: Labels, count: int, names: Mapping[str, int] | None = None, device: torch.device | None = None) -> Tensor:
    """Class numbers (B,) of labels.

    Args:
        labels: one or B, numbers from 0 to count - 1 or names.
        count: number of classes.
        names: number of each name.

    Raises:
        ValueError: a label out of range, an unknown name, or no labels at all.
    """
    values = labels.tolist() if isinstance(labels, Tensor) else labels
    values = [values] if isinstance(values, int | str) else list(values)
    if not values:
        raise ValueError("labels is empty. Give one label for each sample.")
    ids = [_label_id(value, count, names or {}) for value in values]
    return torch.tensor(ids, device=device)


def _label_id(label: int | str, count: int, names: Mapping[str, int]) -> int:
    if isinstance(label, str):
        if label not in names:
            known = f"Known names are in pipe.labels, such as {next(iter(names))!r}." if names else "Give a number."
            raise ValueError(f"There is no label {label!r}. {known}")
        return names[label]
    if label != int(label) or not 0 <= label < count:
        raise ValueError(f"Label {label} is out of range. Give a number from 0 to {count - 1}.")
    return int(label)
