"""Slots: what is searched, and how the network is told of it.

A condition has S slots, each of which holds one row of a vocabulary E (V, D), and may have numbers that are free:

    class of a picture      one slot, whose vocabulary are the K classes or prompts            `ConditionSlot`
    layout                  class and corners of N objects, or class and box                   `genkit.inversion.layouts`
    any tokens              S slots of one table                                               `TokenSlots`
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.embeddings import Embeddings


@dataclasses.dataclass(frozen=True, eq=False)
class Free:
    """Numbers beside the slots that are not rows of a vocabulary, such as boxes.

    Args:
        shape: of them.
        low, high: their range.

    Raises:
        ValueError: an empty range.
    """

    shape: tuple[int, ...]
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"The range from {self.low} to {self.high} is empty.")


class Vocabulary:
    """What S slots may hold.

    Args:
        table: (V, D), the embeddings.
        allowed: (S, V) bool, the rows that each slot may hold; (V,) for a single slot. By default one slot with all rows.
        mean, std: of the numbers of the table that the vocabulary comes from, by default its own.
        free: numbers beside the slots.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a slot that may hold nothing.
    """

    def __init__(
        self, table: Tensor, allowed: Tensor | None = None, *, mean: float | None = None, std: float | None = None,
        free: Free | None = None,
    ) -> None:  # fmt: skip
        if table.ndim != 2 or not len(table):
            raise ValueError(f"A vocabulary is a table (V, D), got {tuple(table.shape)}.")
        if not torch.isfinite(table).all():
            raise ValueError("The vocabulary has values that are not finite.")
        allowed = torch.ones(1, len(table), dtype=torch.bool) if allowed is None else torch.atleast_2d(allowed)
        if allowed.shape[1] != len(table) or allowed.dtype != torch.bool:
            raise ValueError(
                f"The masks are {tuple(allowed.shape)} of {allowed.dtype}, for {len(table)} rows. Give (slots, rows) of bool."
            )
        if not allowed.any(1).all():
            raise ValueError(
                f"Slot {int((~allowed.any(1)).nonzero()[0])} may hold no row of the vocabulary. Allow it at least one."
            )
        self.table, self.allowed, self.free = table.detach(), allowed.to(table.device), free
        self.mean = float(table.mean()) if mean is None else mean
        self.std = float(table.std()) if std is None else std

    def __len__(self) -> int:
        return len(self.allowed)

    @property
    def share(self) -> Tensor:
        """Weights (S, V) of the mean over what each slot may hold."""
        allowed = self.allowed.to(self.table.float())
        return allowed / allowed.sum(1, keepdim=True)

    def scattered(self, count: int, generator: torch.Generator) -> Tensor | None:
        """Free numbers (count, *free.shape) that a search may begin with: anywhere in their range. None without `Free`."""
        if self.free is None:
            return None
        numbers = torch.rand((count, *self.free.shape), generator=generator).to(self.table.device)
        return self.free.low + (self.free.high - self.free.low) * numbers

    def check(self, rows: Tensor) -> Tensor:
        """Rows (..., S) as they are.

        Raises:
            ValueError: another number of slots, or a row that its slot may not hold.
        """
        rows = rows.to(self.table.device)
        if rows.shape[-1] != len(self) or rows.is_floating_point():
            raise ValueError(
                f"Rows of shape {tuple(rows.shape)} do not fit {len(self)} slots. Give whole numbers (..., {len(self)})."
            )
        known = (rows >= 0) & (rows < len(self.table))
        legal = known & self.allowed[torch.arange(len(self), device=rows.device), rows.where(known, 0)]
        if not legal.all():
            wrong = (~legal).nonzero()[0].tolist()
            raise ValueError(f"Slot {wrong[-1]} may not hold row {int(rows[tuple(wrong)])} of {len(self.table)}.")
        return rows


class Slots(Vocabulary, ABC):
    """Slots that a network can be told of."""

    @abstractmethod
    def condition(self, rows: Tensor, offset: Tensor, free: Tensor | None) -> AbstractContextManager[Cond]:
        """The condition of B samples, for as long as the context lasts.

        Args:
            rows: (B, S), what each slot holds.
            offset: (B, S, D), added to its embedding; may require a gradient.
            free: (B, *free.shape), may require a gradient; None without `Free`.
        """


class ConditionSlot(Slots):
    """One slot: which of K conditions.

    Args:
        cond: of any denoiser, all different.
        allowed: (K,) bool, those that may be the answer.

    Example:
        >>> slots = ConditionSlot(denoiser, denoiser.condition(prompts=["a seven", "a two", "a one"]))
    """

    def __init__(self, denoiser: Denoiser, cond: Cond, allowed: Tensor | None = None) -> None:
        self.embeddings = Embeddings(denoiser, cond)
        super().__init__(self.embeddings.table, allowed, mean=self.embeddings.mean, std=self.embeddings.std)

    def condition(self, rows: Tensor, offset: Tensor, free: Tensor | None) -> AbstractContextManager[Cond]:
        return self.embeddings.displaced(rows[:, 0], offset[:, 0])


class TokenSlots(Slots):
    """S tokens of one table, side by side.

    Args:
        encode: from embedded tokens (B, S, D) to the condition, differentiable.
        table, allowed: see `Vocabulary`.

    Example:
        >>> slots = TokenSlots(lambda tokens: Cond({"layout_embeds": codec.encode(tokens)}), codec.table.weight, allowed)
    """

    def __init__(self, encode: Callable[[Tensor], Cond], table: Tensor, allowed: Tensor) -> None:
        super().__init__(table, allowed)
        self.encode = encode

    @contextmanager
    def condition(self, rows: Tensor, offset: Tensor, free: Tensor | None) -> Iterator[Cond]:
        yield self.encode(self.table[rows] + offset)
