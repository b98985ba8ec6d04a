"""Between a search, which knows nothing of networks, and whoever evaluates for it: a search is a generator of queries.

answer = yield Query(...)
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from genkit.inversion.slots import Vocabulary


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """Losses that are wanted, at W points on the same m pairs.

    Args:
        rows: (W, S), what the slots hold.
        pairs: (m,) numbers of pairs.
        gradient: whether the mean gradient over the pairs is wanted too.
        final: whether these rows may be the answer. All pairs are asked for then, and no answer is waited for.
        offset: (W, S, D) to be added to the embeddings of the rows, None for nothing.
        free: (W, ...), or None.
        walkers: (W,) whose points these are.
    """

    rows: Tensor
    pairs: np.ndarray
    gradient: bool = False
    final: bool = False
    offset: Tensor | None = None
    free: Tensor | None = None
    walkers: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """Losses (W, m) in float64, and the mean gradients (W, S, D) and (W, ...) in embeddings and free numbers, or None."""

    losses: np.ndarray
    gradient: Tensor | None = None
    free: Tensor | None = None


Queries = Generator[Query, "Answer | None", None]


class Search(ABC):
    """A way to search the vocabulary."""

    @abstractmethod
    def begin(self, slots: Vocabulary, pairs: np.ndarray, generator: torch.Generator, start: Query | None = None) -> Queries:
        """Search.

        Args:
            pairs: (N,) those of the plan, in an order whose beginnings are spread over all levels, see `spread`.
            generator: of all that is random, on the CPU.
            start: the best point of an earlier search, to go on from.
        """

    @property
    @abstractmethod
    def opening(self) -> int:
        """Evaluations until the first rows have a loss."""

    @abstractmethod
    def check(self, pairs: int) -> None:
        """Raise ValueError for a number of pairs that is too small."""


def spread(u: np.ndarray) -> np.ndarray:
    """Numbers (N,) of pairs at times u (N,), in an order whose beginnings are spread over all times.

    It is their own order, unless that is a grid's, from one end to the other.
    """
    if len(u) > 1 and bool((np.diff(u) >= 0).all()):
        golden = (0.5 + np.arange(len(u)) * (math.sqrt(5) - 1) / 2) % 1.0
        return np.argsort(np.argsort(golden))
    return np.arange(len(u))
