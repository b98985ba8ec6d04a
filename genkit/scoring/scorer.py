"""Scorer: runs policies on many images at once, over one queue.

Policies ask for losses image by image, and for fewer and fewer as classes drop out. Their items (image, condition, pair) meet in a
queue, from which batches are filled whatever image they come from, so elimination never starves the device. A loss depends on
its item alone: results do not depend on the batch size, the order of images or classes, or the number of processes (to rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.attention.folding import Evaluator
from genkit.attention.proof import Proof, proving
from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.embeddings import Embeddings
from genkit.denoisers.mixing import mixed
from genkit.levels import Level
from genkit.scoring.losses import check_metric, row_losses, shared_losses
from genkit.scoring.plan import PairPlan, Pairs
from genkit.scoring.policy import Policy, Search, Verdict
from genkit.scoring.queue import Queue


class Scorer:
    """Scores samples under conditions.

    Args:
        denoiser: any adapter.
        plan: which pairs.
        metric: "l2", "l1" or "huber", of the error of eps. The published choices are l1 for CIFAR-10, STL-10, Pets and Flowers, l2
            for the others.
        batch_size: network evaluations at a time.
        scheduler: whose noise schedule the pairs have; that of the denoiser's pipeline by default.
        pad: fill every batch up to a power of two, for compiled networks and CUDA graphs; by default on anything but a CPU.
        fold: compute once what the rows of a batch share: the keys and values of a prompt, and all that comes before the first
            cross-attention (`genkit.attention.folding`). Losses are equal up to rounding. Networks without cross-attention, and
            compiled ones, are evaluated plainly in any case.

    Raises:
        ValueError: an unknown metric, or a batch size below 1.

    Example:
        >>> scorer = Scorer(Denoiser.of(pipe), PairPlan(count=64))
        >>> cond = scorer.denoiser.condition(prompts=["a seven", "a two"])
        >>> for image, verdict in scorer.run(scorer.denoiser.encode(images), cond, Race()):
        ...     print(image, verdict.label, verdict.evaluations)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: PairPlan | None = None,
        *,
        metric: str = "l2",
        batch_size: int = 128,
        scheduler: Any = None,
        pad: bool | None = None,
        fold: bool = True,
    ) -> None:
        check_metric(metric)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.denoiser, self.plan, self.metric, self.batch_size = denoiser, plan or PairPlan(), metric, batch_size
        self.scheduler = denoiser.pipe.scheduler if scheduler is None else scheduler
        self.pad = denoiser.device.type != "cpu" if pad is None else pad
        self.fold = fold
        self.proof = Proof(denoiser)
        self._pairs: Pairs | None = None
        self._noise: dict[int, Tensor] = {}

    def pairs(self, shape: Sequence[int]) -> Pairs:
        """The plan's pairs for samples (..., *shape)."""
        if self._pairs is None or self._pairs.shape != tuple(shape):
            self._pairs, self._noise = self.plan.pairs(self.scheduler, shape), {}
        return self._pairs

    def table(self, x0: Tensor, cond: Cond) -> Tensor:
        """Weighted losses (I, K, N) in float64 of I samples x0 (I, ...), K conditions and all N pairs."""
        pairs = self.pairs(x0.shape[1:])
        losses = self.denoiser.losses(x0, pairs, cond, metric=self.metric, batch_size=self.batch_size, fold=self.fold)
        return losses * pairs.weight

    def run(
        self,
        x0: Tensor | Iterable[Tensor],
        cond: Cond,
        policy: Policy,
        *,
        offsets: np.ndarray | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        merge: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Verdict]]:
        """Find the best condition of each sample.

        Args:
            x0: clean samples (I, ...), or an iterable of samples (...) of one shape, taken as they are needed.
            cond: K conditions.
            policy: how to search.
            offsets: added to the weighted loss of each arm (A,), for priors.
            classes: the rows of `cond` of each class, where a class has several; one each by default.
            merge: an arm is a class, whose loss is the mean over its rows; else every row is an arm, and the search ends when the
                arms left are of one class.
            progress: called with the number of network evaluations after each batch.

        Yields:
            (number of the sample, verdict), in the order in which they are decided.

        Raises:
            FloatingPointError: a loss is NaN or infinite; names sample, condition and pair.
        """
        rows = [[k] for k in range(len(cond))] if classes is None else [list(c) for c in classes]
        arms = rows if merge else [[k] for row in rows for k in row]
        groups = None if merge or classes is None else np.array([c for c, row in enumerate(rows) for _ in row])
        costs = np.array([len(row) for row in arms])
        queue = Queue(self, cond, arms, progress)

        def begin(sample: Tensor) -> Search:
            return policy.search(len(arms), self.pairs(sample.shape).u, offsets=offsets, groups=groups, costs=costs)

        return queue.drain(iter(x0), begin)

    def losses(self, evaluate: Evaluator, x0: Tensor, samples: np.ndarray, rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Weighted losses (n,) of items: samples (n,) of x0 (I, ...), under rows (n,) of the condition, on pairs (n,).

        Args:
            evaluate: `genkit.attention.folding.evaluator` of the condition.
        """
        plan = self.pairs(x0.shape[1:])
        padded = self._padded(samples) * len(plan) + self._padded(pairs)
        noised, inverse = np.unique(padded, return_inverse=True)
        x0, level, eps = self._noised(x0[noised // len(plan)], noised % len(plan))
        places, prompts = torch.from_numpy(inverse), torch.from_numpy(self._padded(rows))
        with torch.no_grad(), proving(self.proof) as proof, proof.step("losses", tuple(x0.shape[1:])):
            values = shared_losses(evaluate, x0, level, eps, places, prompts, self.metric)
        return values[: len(rows)].cpu().numpy() * self._pair_weights(pairs)

    def slopes(self, x0: Tensor, cond: Cond, weights: Tensor, pairs: np.ndarray) -> np.ndarray:
        """Derivatives (n, K) of the weighted losses in the weights (n, K) of a mixed condition."""
        with torch.enable_grad():
            weights = weights.to(self.denoiser.device).requires_grad_(True)
            with mixed(self.denoiser, cond, weights) as condition, proving(self.proof) as proof, proof.step("slopes"):
                values = row_losses(self.denoiser, *self._noised(x0, pairs), condition, self.metric)
                (gradient,) = torch.autograd.grad(values.sum(), weights)
        return gradient.double().cpu().numpy() * self._pair_weights(pairs)[:, None]

    def gradients(self, x0: Tensor, embeddings: Embeddings, rows: np.ndarray, offset: Tensor, pairs: np.ndarray) -> np.ndarray:
        """Weighted losses and their gradients (n, 1 + D) in the embeddings of the condition.

        Args:
            x0: (n, ...).
            rows, offset, pairs: (n,), (n, D), (n,), the row of each, how far from it, and the pair.
        """
        with torch.enable_grad():
            offset = offset.to(self.denoiser.device).requires_grad_(True)
            place = torch.from_numpy(rows)
            with embeddings.displaced(place, offset) as condition, proving(self.proof) as proof, proof.step("gradients"):
                values = row_losses(self.denoiser, *self._noised(x0, pairs), condition, self.metric)
                (gradient,) = torch.autograd.grad(values.sum(), offset)
        found = torch.cat([values.detach()[:, None].cpu(), gradient.double().cpu()], dim=1).numpy()
        return found * self._pair_weights(pairs)[:, None]

    def _noised(self, x0: Tensor, pairs: np.ndarray) -> tuple[Tensor, Level, Tensor]:
        """Samples (n, ...), and level and noise of the pair (n,) of each."""
        plan = self.pairs(x0.shape[1:])
        missing = [i for i in dict.fromkeys(pairs.tolist()) if i not in self._noise]
        if missing:
            self._noise |= dict(zip(missing, plan.noise(missing), strict=True))
        eps = torch.stack([self._noise[i] for i in pairs.tolist()]).to(x0)
        return x0, plan.level[torch.from_numpy(pairs)], eps

    def _padded(self, values: np.ndarray) -> np.ndarray:
        """The values, the last one repeated up to the next power of two, or up to the batch size."""
        if not self.pad:
            return values
        size = min(1 << (len(values) - 1).bit_length(), max(self.batch_size, len(values)))
        return np.pad(values, (0, size - len(values)), "edge")

    def _pair_weights(self, pairs: np.ndarray) -> np.ndarray:
        assert self._pairs is not None
        return self._pairs.weight.numpy()[pairs]
