"""Embeddings: what tells K conditions apart, as K vectors in a space where a condition can be moved by a gradient.

    class labels        the rows of the label's embedding table. diffusers' DiT has a copy in each of its blocks: copies that are
    equal count
                        once and are moved together, those that differ are put side by side
    text, layouts, ...  every floating tensor of the condition in one row, in orthonormal coordinates of the span of the K rows,
    which
                        keeps all distances between them, at K - 1 numbers a condition however long a prompt is

A displacement of zero leaves a condition bit for bit as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.mixing import label_tables

_FLAT = 1e-5  # directions in which the rows spread less than this, relative to the widest, are rounding


class Embeddings:
    """The K rows of a condition as vectors.

    Args:
        cond: K conditions, all different.

    Attributes:
        table: (K, D) in float32.
        mean, std: of the numbers of the whole table, of a label's with the rows of the classes that `cond` has not.

    Raises:
        ValueError: conditions without embeddings, since they are all equal or made of whole numbers.

    Example:
        >>> embeddings = Embeddings(denoiser, denoiser.condition(labels=range(1000)))
        >>> offset = torch.zeros(2, embeddings.table.shape[1], requires_grad=True)
        >>> with embeddings.displaced(torch.tensor([3, 7]), offset) as cond:
        ...     loss = denoiser(x, level, cond).eps.square().mean()
    """

    def __init__(self, denoiser: Denoiser, cond: Cond) -> None:
        self.cond = cond
        self._parts = _parts(denoiser, cond)
        if not self._parts:
            raise ValueError(f"These {len(cond)} conditions of {denoiser.family} have no embeddings that could tell them apart.")
        self.table = torch.cat([part.table for part in self._parts], dim=1)
        whole = torch.cat([part.whole.flatten() for part in self._parts])
        self.mean, self.std = float(whole.mean()), float(whole.std())

    @contextmanager
    def displaced(self, rows: Tensor, offset: Tensor) -> Iterator[Cond]:
        """The condition of B samples: rows (B,) of the K, moved by `offset` (B, D), which may require a gradient.

        It holds inside the block.
        """
        condition = self.cond[rows.to(next(iter(self.cond.tensors.values())).device)]
        tensors, hooks = dict(condition.tensors), []
        for part, moved in zip(self._parts, offset.split([part.table.shape[1] for part in self._parts], dim=1), strict=True):
            hooks += part.displace(tensors, moved)
        try:
            yield Cond(tensors)
        finally:
            for hook in hooks:
                hook.remove()


class _Part(Protocol):
    table: Tensor  # (K, D)
    whole: Tensor  # what mean and std are taken of

    def displace(self, tensors: dict[str, Tensor], offset: Tensor) -> list[Any]:
        """Move `tensors` in place, or by hooks, which are returned."""


def _parts(denoiser: Denoiser, cond: Cond) -> list[_Part]:
    parts: list[_Part] = []
    floating = []
    for name, value in cond.tensors.items():
        if bool((value == value[:1]).all()):
            continue  # the same for all
        if value.is_floating_point():
            floating.append(name)
        elif name == "class_labels":
            parts += _distinct(label_tables(denoiser.network), value)
        elif not name.endswith("attention_mask"):
            raise ValueError(f"The condition {name!r} of {denoiser.family} is made of whole numbers and has no embedding.")
    return [*parts, _Spanned(cond, floating)] if floating else parts


def _distinct(tables: list[nn.Embedding], labels: Tensor) -> list[_Part]:
    """A part for each group of equal tables."""
    groups: list[list[nn.Embedding]] = []
    for table in tables:
        same = next((group for group in groups if torch.equal(group[0].weight, table.weight)), None)
        if same is None:
            groups.append([table])
        else:
            same.append(table)
    return [_Looked(group, labels) for group in groups]


class _Looked:
    """Rows of equal embedding tables, in which the network looks a class label up."""

    def __init__(self, tables: list[nn.Embedding], labels: Tensor) -> None:
        self.tables, self.whole = tables, tables[0].weight.detach().float()
        self.table = self.whole[labels.to(self.whole.device)]

    def displace(self, tensors: dict[str, Tensor], offset: Tensor) -> list[Any]:
        return [table.register_forward_hook(lambda _, __, output: output + offset.to(output)) for table in self.tables]


class _Spanned:
    """Floating tensors of a condition, in the coordinates of their span."""

    def __init__(self, cond: Cond, names: list[str]) -> None:
        self.shapes = {name: cond.tensors[name].shape[1:] for name in names}
        rows = torch.cat([cond.tensors[name].detach().float().flatten(1) for name in names], dim=1)
        left, spread, basis = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        wide = spread > _FLAT * spread[0]
        self.basis = basis[wide]
        self.table = self.whole = left[:, wide] * spread[wide]

    def displace(self, tensors: dict[str, Tensor], offset: Tensor) -> list[Any]:
        moved = (offset @ self.basis.to(offset)).split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        for (name, shape), part in zip(self.shapes.items(), moved, strict=True):
            tensors[name] = tensors[name] + part.reshape(-1, *shape).to(tensors[name])
        return []
