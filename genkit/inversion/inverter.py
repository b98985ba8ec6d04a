"""DiscreteInverter: which tokens explain a sample? Inverts a conditional diffusion model over a discrete condition, by Bayes' rule

    argmin_y  sum of terms(y),     -log p(x0 | y) - log p(y)

DIVE: Discrete Inversion of a diffusion model into a classifier and a detector (IEEE TMM 2025, arXiv 2504.17253). A gradient
proposes rows of a vocabulary, and the terms themselves, on pairs that all share, decide between those.

Loss and gradient of a pair depend on what the slots hold alone. They are remembered, which changes no bit of the course: rows of
a batch are evaluated in calls of one fixed shape, in which they do not depend on each other (checked on CPUs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.attention.proof import Proof, proving
from genkit.denoisers.base import Denoiser
from genkit.denoisers.modes import frozen
from genkit.inversion.leaps import Leaps
from genkit.inversion.query import Answer, Query, Search, spread
from genkit.inversion.slots import Slots
from genkit.inversion.terms import Batch, Likelihood, Term
from genkit.scoring.plan import PairPlan


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Rows that could be the answer: the end of a descent's loop, or a finalist of leaps; and the mean over all pairs there."""

    rows: tuple[int, ...]
    nats: float
    walker: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Inversion:
    """What explains a sample best.

    Args:
        rows: (S,) rows of the vocabulary.
        free: the free numbers, or None.
        nats: sum of the terms there, up to a constant.
        evaluations: of the denoiser; a backward pass counts as one.
        trace: what was in question, in the order of the search.
    """

    rows: Tensor
    free: Tensor | None
    nats: float
    evaluations: int
    trace: list[Checkpoint]


class DiscreteInverter:
    """Searches the condition that explains a sample.

    Args:
        denoiser: a conditional one.
        slots: what is searched.
        search: how, `Leaps()` by default; several go on from the best that those before have found.
        terms: what is minimised; `Likelihood(denoiser)` by default.
        plan: pairs of noise level and noise; 32 with "elbo" weights by default, which make nats.
        memoise: remember losses and gradients. It costs memory, (S D + 1) numbers for each pair and condition met, and is exact.
        batch_size: network evaluations at a time; every call is filled up to it.
        seed: of what is random in the search.

    Raises:
        ValueError: numbers out of range, or a prior beside a likelihood that is not in nats.

    Example:
        >>> slots = ConditionSlot(denoiser, denoiser.condition(labels=range(1000)))
        >>> for found in DiscreteInverter(denoiser, slots).fit(denoiser.encode(images)):
        ...     print(int(found.rows), found.nats, found.evaluations)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        slots: Slots,
        *,
        search: Search | Sequence[Search] | None = None,
        terms: Sequence[Term] | None = None,
        plan: PairPlan | None = None,
        memoise: bool = True,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.denoiser, self.slots = denoiser, slots
        self.searches = [search or Leaps()] if search is None or isinstance(search, Search) else list(search)
        self.terms = [Likelihood(denoiser)] if terms is None else list(terms)
        self.plan = plan or PairPlan(count=32, weighting="elbo")
        self.memoise, self.batch_size, self.seed = memoise, batch_size, seed
        self.proof = Proof(denoiser)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if not self.searches or not self.terms:
            raise ValueError("Give at least one search, such as Leaps(), and at least one term, such as Likelihood(denoiser).")
        for each in self.searches:
            each.check(self.plan.count)
        if len(self.terms) > 1 and self.plan.weighting == "uniform":
            raise ValueError('Terms add up in nats, which uniform weights are not. Give PairPlan(weighting="elbo").')

    def fit(self, x0: Tensor, progress: Callable[[int], None] | None = None) -> list[Inversion]:
        """Invert the model for each of I clean samples x0 (I, ...).

        Args:
            progress: called with the number of evaluations after each call of the network.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
        """
        if not len(x0):
            raise ValueError("There are no samples. Give at least one.")
        searches = [_Course(self, x0[i]) for i in range(len(x0))]
        progress = progress or (lambda evaluations: None)
        with frozen(self.denoiser.network):
            while running := [search for search in searches if search.query is not None]:
                self._evaluate([item for search in running for item in search.missing()], progress)
                for search in running:
                    search.go_on()
        return [search.result() for search in searches]

    def score(self, x0: Tensor, rows: Tensor, free: Tensor | None = None) -> Tensor:
        """Nats (B, N) of samples x0 (B, ...) under rows (B, S) and free numbers (B, ...), on each pair, in float64.

        Differences between conditions of one sample are log posterior ratios: of a layout with and without an object, its score.
        """
        rows = self.slots.check(rows)
        items = [
            _Item(x0[i], rows[i], None, None if free is None else free[i], pair, False)
            for i in range(len(rows))
            for pair in range(self.plan.count)
        ]
        with frozen(self.denoiser.network):
            self._evaluate(items, lambda evaluations: None)
        return torch.tensor([item.loss for item in items], dtype=torch.float64).view(len(rows), -1)

    def _evaluate(self, items: list[_Item], progress: Callable[[int], None]) -> None:
        for gradient in (True, False):
            wanted = [item for item in items if item.gradient == gradient]
            for start in range(0, len(wanted), self.batch_size):
                part = wanted[start : start + self.batch_size]
                # Rows are the same to the last bit only in calls of the same shape.
                self._call(part + part[-1:] * (self.batch_size - len(part)), gradient)
                progress(len(part) * (1 + gradient))

    def _call(self, items: list[_Item], gradient: bool) -> None:
        """Fill in loss and gradient of items."""
        device = self.denoiser.device
        rows = torch.stack([item.rows for item in items])
        nothing = torch.zeros(len(self.slots), self.slots.table.shape[1], device=rows.device)
        offset = torch.stack([nothing if item.offset is None else item.offset for item in items])
        free = None if items[0].free is None else torch.stack([item.free for item in items if item.free is not None])
        kind = "gradients" if gradient else "losses"
        with torch.set_grad_enabled(gradient), proving(self.proof) as proof, proof.step("inversion", kind):
            offset.requires_grad_(gradient)
            inputs = [offset] if free is None else [offset, free.requires_grad_(gradient)]
            with self.slots.condition(rows, offset, free) as cond:
                x0, pairs = torch.stack([item.x0 for item in items]).to(device), np.array([item.pair for item in items])
                batch = Batch(x0, self.slots, rows, offset, free, cond, pairs)
                losses = sum((t.weight * t.losses(batch, self.plan).cpu() for t in self.terms), torch.zeros(len(items)))
            # A prior that is a table has no graph.
            graded = gradient and losses.requires_grad
            found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True) if graded else (None,) * len(inputs)
        if not bool(torch.isfinite(losses).all()):
            bad = int((~torch.isfinite(losses)).nonzero()[0])
            raise FloatingPointError(
                f"The loss of rows {items[bad].rows.tolist()} on pair {items[bad].pair} is {float(losses[bad].detach())}. "
                "Use float32, or bfloat16 instead of float16."
            )
        values = losses.detach().tolist()
        for i, item in enumerate(items):
            item.loss = values[i]
            if gradient:
                item.gradients = [torch.zeros_like(x[i]) if g is None else g[i] for g, x in zip(found, inputs, strict=True)]


@dataclasses.dataclass(eq=False)
class _Item:
    """Loss, and gradient if wanted, of what the slots hold on a pair."""

    x0: Tensor
    rows: Tensor
    offset: Tensor | None
    free: Tensor | None
    pair: int
    gradient: bool
    loss: float = float("nan")
    gradients: list[Tensor] = dataclasses.field(default_factory=list)


class _Course:
    """The searches of a sample, one after the other, and what is known of it."""

    def __init__(self, inverter: DiscreteInverter, x0: Tensor) -> None:
        self.inverter, self.x0 = inverter, x0
        self.known: dict[Any, _Item] = {}
        self.wanted: list[list[_Item]] = []
        self.evaluations = 0
        self.trace: list[Checkpoint] = []
        self.best: tuple[float, Query] | None = None
        self.answer: Answer | None = None
        self.queries = self._queries()
        self.query: Query | None = next(self.queries)

    def _queries(self) -> Iterator[Query]:
        generator, order = torch.Generator().manual_seed(self.inverter.seed), spread(self.inverter.plan.times(1000))
        for search in self.inverter.searches:
            start = None if self.best is None else self.best[1]
            queries = search.begin(self.inverter.slots, order, generator, start)
            query = next(queries, None)
            while query is not None:
                yield query
                try:
                    query = queries.send(self.answer)
                except StopIteration:
                    query = None

    def missing(self) -> list[_Item]:
        """The items of the query that are not known; `wanted` has them all, by point."""
        assert self.query is not None
        query, missing = self.query, []
        self.wanted = []
        for w, rows in enumerate(query.rows):
            offset, free = (None if value is None else value[w] for value in (query.offset, query.free))
            key = (tuple(rows.tolist()), None if free is None else tuple(free.flatten().tolist()))
            items = []
            for pair in query.pairs.tolist():
                item = self.known.get((key, pair)) if self.inverter.memoise and offset is None else None
                if item is None or (query.gradient and not item.gradient):
                    item = _Item(self.x0, rows, offset, free, pair, query.gradient)
                    missing.append(item)
                    if self.inverter.memoise and offset is None:
                        self.known[key, pair] = item
                items.append(item)
            self.wanted.append(items)
        self.evaluations += sum(1 + item.gradient for item in missing)
        return missing

    def go_on(self) -> None:
        """Answer the query and take the next one."""
        assert self.query is not None
        losses = np.array([[item.loss for item in items] for items in self.wanted])
        gradients: list[Tensor | None] = [None, None]
        if self.query.gradient:
            for k in range(len(self.wanted[0][0].gradients)):
                gradients[k] = torch.stack([torch.stack([item.gradients[k] for item in items]).mean(0) for items in self.wanted])
        self.answer = Answer(losses, *gradients)
        if self.query.final:
            self._note(losses.mean(1).tolist())
        self.query = next(self.queries, None)
        if self.query is None:
            self.known.clear()

    def _note(self, nats: list[float]) -> None:
        query = self.query
        assert query is not None
        for w, value in enumerate(nats):
            walker = None if query.walkers is None else int(query.walkers[w])
            self.trace.append(Checkpoint(tuple(query.rows[w].tolist()), value, walker))
            if self.best is None or value < self.best[0]:
                free = None if query.free is None else query.free[w : w + 1]
                self.best = value, Query(query.rows[w : w + 1], query.pairs, free=free)

    def result(self) -> Inversion:
        assert self.best is not None
        nats, query = self.best
        free = None if query.free is None else query.free[0]
        return Inversion(query.rows[0], free, nats, self.evaluations, self.trace)
