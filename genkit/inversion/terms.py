"""What is minimised: a weighted sum of terms in nats, by Bayes' rule -log p(x0 | y) - log p(y) up to a constant,

    likelihood        1/2 int E ||eps - eps_theta(x_t, t, y)||^2 d lambda  =  -log p(x0 | y) + const
    diffusion prior   1/2 int E ||eps - eps_phi(y_t, t)||^2 d lambda       =  -log p(y) + const        y the embedded tokens
    log-prior         -log p(y) itself: a table, or any function of the condition

Every term is estimated on the pairs (noise level, noise) of one plan; a weight is explicit and in nats, 1 by default: means over
elements instead of sums, as published code has them, give terms of different sizes an arbitrary ratio.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.denoisers.base import Cond, Denoiser
from genkit.inversion.slots import Slots
from genkit.scoring.losses import check_metric, row_losses
from genkit.scoring.plan import PairPlan, Pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B items: a sample, what its slots hold, and a pair.

    Args:
        x0: clean samples (B, ...).
        slots: what `rows` are of.
        rows: (B, S).
        offset: (B, S, D), added to the rows' embeddings.
        free: (B, ...), or None.
        cond: of the denoiser.
        pairs: (B,) numbers of pairs of the plan.
    """

    x0: Tensor
    slots: Slots
    rows: Tensor
    offset: Tensor
    free: Tensor | None
    cond: Cond
    pairs: np.ndarray

    @property
    def embeddings(self) -> Tensor:
        """What the slots hold (B, S, D)."""
        return self.slots.table[self.rows].to(self.offset) + self.offset


class Term(ABC):
    """A part of what is minimised.

    Args:
        weight: of its nats.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight={weight} of {type(self).__name__} must be finite and not negative.")
        self.weight = weight

    @abstractmethod
    def losses(self, batch: Batch, plan: PairPlan) -> Tensor:
        """Nats (B,) in float64 of each item, differentiable in its offset and free numbers; their mean over all pairs of the plan
        is the term.
        """


class _Denoised(Term):
    """An error of a denoiser."""

    def __init__(self, denoiser: Denoiser, weight: float, scheduler: Any, metric: str = "l2") -> None:
        super().__init__(weight)
        check_metric(metric)
        self.denoiser, self.metric = denoiser, metric
        self.scheduler = denoiser.pipe.scheduler if scheduler is None else scheduler
        self._pairs: Pairs | None = None
        self._noise = torch.empty(0)

    def errors(self, x0: Tensor, cond: Cond, numbers: np.ndarray, plan: PairPlan) -> Tensor:
        """Weighted losses (B,) of samples on the plan's pairs of these numbers (B,)."""
        if self._pairs is None or self._pairs.plan != plan or self._pairs.shape != tuple(x0.shape[1:]):
            self._pairs = plan.pairs(self.scheduler, x0.shape[1:])
            self._noise = self._pairs.noise(range(len(self._pairs)))
        index = torch.from_numpy(numbers)
        losses = row_losses(self.denoiser, x0, self._pairs.level[index], self._noise[index].to(x0), cond, self.metric)
        return losses * self._pairs.weight[index].to(losses)


class Likelihood(_Denoised):
    """-log p(x0 | y): how badly a conditional denoiser explains the sample. The plan's weighting counts.

    Args:
        denoiser: any.
        weight: of its nats.
        scheduler: whose noise schedule the pairs have; by default that of the denoiser's pipeline.
        metric: "l2", "l1" or "huber"; only "l2" has nats.
    """

    def __init__(self, denoiser: Denoiser, weight: float = 1.0, *, scheduler: Any = None, metric: str = "l2") -> None:
        super().__init__(denoiser, weight, scheduler, metric)

    def losses(self, batch: Batch, plan: PairPlan) -> Tensor:
        return self.errors(batch.x0, batch.cond, batch.pairs, plan)


class DiffusionPrior(_Denoised):
    """-log p(y) by an unconditional denoiser of embedded tokens, trained on the same vocabulary.

    Args:
        denoiser: of samples (S, D), or of what `encode` returns.
        weight: of its nats.
        encode: from a batch to its samples (B, ...), differentiable in the offset; the embedded tokens by default.
        scheduler: as for `Likelihood`.

    Its evaluations, of a small network, are not counted.
    """

    def __init__(
        self, denoiser: Denoiser, weight: float = 1.0, *, encode: Callable[[Batch], Tensor] | None = None, scheduler: Any = None
    ) -> None:
        super().__init__(denoiser, weight, scheduler)
        self.encode = encode or (lambda batch: batch.embeddings)

    def losses(self, batch: Batch, plan: PairPlan) -> Tensor:
        return self.errors(self.encode(batch), Cond({}), batch.pairs, dataclasses.replace(plan, weighting="elbo"))


class Prior(Term):
    """-log p(y) by a function.

    Args:
        nats: of rows (1, S) and free numbers (1, ...), or None, to one number. It is asked once for each condition.
        weight: of its nats.

    It has no gradient: it decides between candidates, and does not propose any.

    Example:
        >>> Prior(lambda rows, free: prior.nats(slots.packed(rows, free)))  # a `LayoutPriorPipeline` and `LayoutSlots`
    """

    def __init__(self, nats: Callable[[Tensor, Tensor | None], Tensor], weight: float = 1.0) -> None:
        super().__init__(weight)
        self.nats, self._known = nats, dict[Any, float]()

    def losses(self, batch: Batch, plan: PairPlan) -> Tensor:
        found = []
        for i in range(len(batch.rows)):
            rows, free = batch.rows[i : i + 1], None if batch.free is None else batch.free[i : i + 1].detach()
            key = tuple(rows.flatten().tolist()), None if free is None else tuple(free.flatten().tolist())
            if key not in self._known:
                self._known[key] = float(self.nats(rows, free))
            found.append(self._known[key])
        return torch.tensor(found, dtype=torch.float64)


class LogPrior(Term):
    """-log p(y) of slots that are independent of each other.

    Args:
        probabilities: (V,) of every slot, or (S, V), of any sum.
        weight: of its nats.

    It has no gradient: it decides between candidates, and does not propose any.

    Raises:
        ValueError: probabilities that are not positive and finite.
    """

    def __init__(self, probabilities: Tensor, weight: float = 1.0) -> None:
        super().__init__(weight)
        given = torch.as_tensor(probabilities, dtype=torch.float64)
        if not bool(((given > 0) & torch.isfinite(given)).all()):
            raise ValueError(f"The prior {given.tolist()!s:.80} must be positive and finite for every row.")
        self.log_p = torch.atleast_2d(given / given.sum(-1, keepdim=True)).log()

    def losses(self, batch: Batch, plan: PairPlan) -> Tensor:
        if self.log_p.shape[1] != len(batch.slots.table) or len(self.log_p) not in (1, len(batch.slots)):
            raise ValueError(
                f"The prior is {tuple(self.log_p.shape)}, but there are {len(batch.slots)} slots of {len(batch.slots.table)} rows."
            )
        rows = batch.rows.cpu()
        return -self.log_p.expand(len(batch.slots), -1)[torch.arange(len(batch.slots)), rows].sum(1)
