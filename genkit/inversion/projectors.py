"""From a continuous v to the vocabulary E, with a gradient back to v.

    nearest   y = sg(E_k - v) + v, k = argmin_j dist(v, E_j)                    forward a row, backward the identity: the
    straight-through
              estimator of DIVE (arXiv 2504.17253)
    softmax   y = sum_j p_j E_j, p = softmax(-dist^2(v, E) / tau)               forward a mixture, which no network was trained on
    gumbel    y = sg(E_k - m) + m, m the softmax of -dist^2 / tau + Gumbel noise, k its largest (Jang et al. 2017, arXiv 1611.01144)

dist^2 and tau are in units of the vocabulary's mean squared distance to its mean.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genkit.errors import unknown
from genkit.inversion.slots import Vocabulary

METRICS = ("l2", "cosine")


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Where v (R, S, D) is in the vocabulary.

    Args:
        values: (R, S, D), with a graph to v.
        rows: (R, S), the rows that are nearest.
        exact: whether `values` are these rows.
    """

    values: Tensor
    rows: Tensor
    exact: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projector(ABC):
    """A way to project.

    Args:
        metric: "l2" (exact, by differences) or "cosine".

    Raises:
        ValueError: an unknown metric.
    """

    metric: str = "l2"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown("metric of the vocabulary", self.metric, METRICS)

    @abstractmethod
    def __call__(self, v: Tensor, slots: Vocabulary, generator: torch.Generator) -> Projection:
        """Project v (R, S, D)."""

    def distances(self, v: Tensor, slots: Vocabulary) -> Tensor:
        """Distances (R, S, V), infinite to rows that a slot may not hold."""
        table = slots.table.to(v)
        if self.metric == "l2":
            # The usual shortcut by products loses what is left of two numbers that are nearly equal.
            found = torch.cdist(v.flatten(0, 1), table, compute_mode="donot_use_mm_for_euclid_dist").view(*v.shape[:2], -1)
        else:
            found = 1 - torch.nn.functional.normalize(v, dim=-1) @ torch.nn.functional.normalize(table, dim=-1).mT
        return found.masked_fill(~slots.allowed, torch.inf)

    def nearest(self, v: Tensor, slots: Vocabulary) -> Tensor:
        """The nearest rows (R, S)."""
        return self.distances(v.detach(), slots).argmin(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Projector):
    """The straight-through projection to the nearest row."""

    def __call__(self, v: Tensor, slots: Vocabulary, generator: torch.Generator) -> Projection:
        rows = self.nearest(v, slots)
        # v - v is 0, so the value is the row to the last bit, which E_k - v + v is not.
        return Projection(slots.table[rows].to(v) + (v - v.detach()), rows, True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax(Projector):
    """The mixture of rows.

    Args:
        tau: temperature; towards 0 it becomes the nearest row.

    Raises:
        ValueError: a temperature that is not positive.
    """

    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau} must be positive.")

    def logits(self, v: Tensor, slots: Vocabulary) -> Tensor:
        distances = self.distances(v, slots)
        unit = slots.table.to(v).var(0, correction=0).sum() if self.metric == "l2" else 1.0
        return -(distances.square() if self.metric == "l2" else distances) / (self.tau * unit)

    def __call__(self, v: Tensor, slots: Vocabulary, generator: torch.Generator) -> Projection:
        values = self.logits(v, slots).softmax(-1) @ slots.table.to(v)
        return Projection(values, self.nearest(v, slots), False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gumbel(Softmax):
    """A row that is drawn, with the gradient of the mixture."""

    def __call__(self, v: Tensor, slots: Vocabulary, generator: torch.Generator) -> Projection:
        logits = self.logits(v, slots)
        uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        logits = logits - (-uniform.log()).log().to(logits)
        rows = logits.argmax(-1)
        mixture = logits.softmax(-1) @ slots.table.to(v)
        return Projection(slots.table[rows].to(v) + (mixture - mixture.detach()), rows, True)
