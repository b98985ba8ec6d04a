"""The queue between policies, which ask image by image, and the network, which works in batches."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genkit.attention.folding import evaluator, tiled
from genkit.denoisers.base import Cond
from genkit.denoisers.embeddings import Embeddings
from genkit.inversion.slots import Vocabulary
from genkit.scoring.policy import EmbeddingRequest, GradientRequest, Request, Search, SlopeRequest, Verdict

if TYPE_CHECKING:
    from genkit.scoring.scorer import Scorer


@dataclasses.dataclass
class _Running:
    """A sample's search, and the part of its last request that has been answered."""

    index: int
    sample: Tensor
    search: Search
    request: Request | SlopeRequest | GradientRequest | None = None
    answer: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0))
    missing: int = 0


# A running search, where the answer goes, the row of the condition (none for a slope, which takes all), and the pair.
_Item = tuple[_Running, int, int, int]


class Queue:
    """Items of all running searches, answered in batches in the order in which they were asked for.

    Args:
        arms: rows of `cond` that make each arm; the arm's loss is their mean.
        progress: called with the number of evaluations after each batch.
    """

    def __init__(self, scorer: Scorer, cond: Cond, arms: list[list[int]], progress: Callable[[int], None] | None) -> None:
        self.scorer, self.cond, self.arms, self.progress = scorer, cond, arms, progress
        self.evaluate = evaluator(scorer.denoiser, cond, fold=scorer.fold)
        self.losses: deque[_Item] = deque()
        self.slopes: deque[_Item] = deque()
        self.gradients: deque[_Item] = deque()
        self.finished: deque[tuple[int, Verdict]] = deque()

    def drain(self, samples: Iterator[Tensor], begin: Callable[[Tensor], Search]) -> Iterator[tuple[int, Verdict]]:
        """Search every sample; yields its number and verdict when it is decided. Samples are taken as batches need them."""
        index, more = 0, True
        while True:
            # Twice a batch: what one batch decides must not leave the next one short.
            while more and self._waiting() < 2 * self.scorer.batch_size:
                sample = next(samples, None)
                if sample is None:
                    more = False
                else:
                    self._go_on(_Running(index, sample, begin(sample)), None)
                    index += 1
            if not self._waiting() and not self.finished:
                return
            self._work()
            while self.finished:
                yield self.finished.popleft()

    def _waiting(self) -> int:
        return len(self.losses) + len(self.slopes) + len(self.gradients)

    def _work(self) -> None:
        """Answer one batch, of the kind that most items wait for."""
        kinds = [(self.losses, self._answer_losses), (self.slopes, self._answer_slopes), (self.gradients, self._answer_gradients)]
        queue, answer = max(kinds, key=lambda kind: len(kind[0]))
        items = [queue.popleft() for _ in range(min(self.scorer.batch_size, len(queue)))]
        if items:
            answer(items)

    def _answer_losses(self, items: list[_Item]) -> None:
        rows, pairs = (np.array([item[k] for item in items]) for k in (2, 3))
        searches = {running.index: running for running, *_ in items}
        place = {index: i for i, index in enumerate(searches)}
        samples = np.array([place[running.index] for running, *_ in items])
        values = self.scorer.losses(self.evaluate, self._samples(searches.values()), samples, rows, pairs)
        self._add(items, values)
        self._answered(items, len(items))

    def _add(self, items: list[_Item], values: np.ndarray) -> None:
        """Add values (n, ...), whose first number is a loss, to the answers."""
        for (running, slot, row, pair), value in zip(items, values, strict=True):
            wrong = value[~np.isfinite(value)]
            if wrong.size:
                raise FloatingPointError(
                    f"The loss of sample {running.index} under condition {row} on pair {pair} is {wrong.flat[0]}. "
                    "Use float32, or bfloat16 instead of float16."
                )
            running.answer[slot] += value

    def _answer_slopes(self, items: list[_Item]) -> None:
        pairs = np.array([item[3] for item in items])
        weights = torch.zeros(len(items), len(self.cond))
        rows = [[row for arm in running.request.arms for row in self.arms[arm]] for running, *_ in items if running.request]
        for i, row in enumerate(rows):
            weights[i, row] = 1 / len(row)
        values = self.scorer.slopes(self._samples(running for running, *_ in items), self.cond, weights, pairs)
        for (running, *_), value in zip(items, values, strict=True):
            assert running.request is not None
            running.answer += [value[self.arms[arm]].mean() for arm in running.request.arms]
        self._answered(items, 2 * len(items))

    def _answer_gradients(self, items: list[_Item]) -> None:
        rows, pairs = (np.array([item[k] for item in items]) for k in (2, 3))
        offset = torch.zeros(len(items), self.embeddings.table.shape[1])
        for i, (running, slot, *_) in enumerate(items):
            assert isinstance(running.request, GradientRequest)
            if running.request.offset is not None:
                offset[i] = torch.from_numpy(running.request.offset[slot])
        samples = self._samples(running for running, *_ in items)
        self._add(items, self.scorer.gradients(samples, self.embeddings, rows, offset, pairs))
        self._answered(items, 2 * len(items))

    @cached_property
    def embeddings(self) -> Embeddings:
        """Those of all rows of the condition."""
        return Embeddings(self.scorer.denoiser, self.cond)

    def _vocabulary(self, arms: np.ndarray) -> Vocabulary:
        """The embeddings of arms, the mean of its rows of each."""
        table = torch.stack([self.embeddings.table[self.arms[arm]].mean(0) for arm in arms])
        return Vocabulary(table, mean=self.embeddings.mean, std=self.embeddings.std)

    def _answered(self, items: list[_Item], evaluations: int) -> None:
        if self.progress is not None:
            self.progress(evaluations)
        for running, *_ in items:
            running.missing -= 1
            if running.missing == 0:
                self._go_on(running, self._mean(running))

    def _mean(self, running: _Running) -> np.ndarray:
        """The answer as a mean: of an arm's rows, or of the pairs of a slope."""
        if isinstance(running.request, SlopeRequest):
            return running.answer / len(running.request.pairs)
        assert running.request is not None
        counts = np.array([len(self.arms[arm]) for arm in running.request.arms])
        return running.answer / counts.reshape(-1, *[1] * (running.answer.ndim - 1))

    def _go_on(self, running: _Running, answer: np.ndarray | None) -> None:
        """Give a search its answer and queue what it asks for next, or keep its verdict."""
        try:
            request = next(running.search) if answer is None else running.search.send(answer)
            while isinstance(request, EmbeddingRequest):
                request = running.search.send(self._vocabulary(request.arms))
        except StopIteration as stop:
            self.finished.append((running.index, stop.value))
            return
        running.request, running.answer = request, np.zeros(len(request.arms))
        if isinstance(request, SlopeRequest):
            items = [(running, 0, 0, int(pair)) for pair in request.pairs]
            self.slopes.extend(items)
        else:
            asked = zip(request.arms, request.pairs, strict=True)
            items = [(running, slot, row, int(pair)) for slot, (arm, pair) in enumerate(asked) for row in self.arms[arm]]
            if isinstance(request, GradientRequest):
                running.answer = np.zeros((len(request.arms), 1 + self.embeddings.table.shape[1]))
                self.gradients.extend(items)
            else:
                rows, pairs = (np.array([item[k] for item in items]) for k in (2, 3))
                self.losses.extend(items[i] for i in tiled(pairs, rows, self.scorer.batch_size))
        running.missing = len(items)

    def _samples(self, searches: Iterable[_Running]) -> Tensor:
        return torch.stack([running.sample for running in searches]).to(self.scorer.denoiser.device)
