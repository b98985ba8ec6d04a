"""DiffusionClassifierPipeline: any supported diffusers pipeline as a zero-shot image classifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from genkit.attention.proof import Proof
from genkit.denoisers.modes import evaluating
from genkit.errors import unknown
from genkit.pipelines.base import HostedPipeline
from genkit.pipelines.classes import Classes, Label, classes_of
from genkit.pipelines.pictures import Images, is_single, pictures
from genkit.scoring import PairPlan, Pairs, Policy, Scorer, Verdict
from genkit.scoring.calibration import REDUCTIONS, posterior, reduce_prompts
from genkit.scoring.named import plan_policy
from genkit.scoring.null import AgainstNull

_ENCODED = 16  # images encoded at once


@dataclasses.dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Args:
        label: the class.
        scores: mean weighted loss of each label, lower is better, without the prior; infinite where it was not scored. With `pmi`
            the null condition's is subtracted.
        probabilities: posterior of each label.
        error_bound: see `genkit.scoring.Verdict`.
        evaluations: of the network.
        verdict: the policy's own account; its arms are the prompts (with `reduce="mean"` the labels), then groups, then the null.
    """

    label: str
    scores: dict[str, float]
    probabilities: dict[str, float]
    error_bound: float
    evaluations: int
    verdict: Verdict


@dataclasses.dataclass
class DiffusionClassifierOutput(BaseOutput):
    """What `DiffusionClassifierPipeline` returns, one entry for each image; None where the call was interrupted before.

    Args:
        labels, scores, probabilities, error_bounds, evaluations, verdicts: see `Classification`.
    """

    labels: list[str | None]
    scores: list[dict[str, float] | None]
    probabilities: list[dict[str, float] | None]
    error_bounds: list[float | None]
    evaluations: list[int | None]
    verdicts: list[Verdict | None]


class _Interrupted(Exception):
    """Ends a search from within, after `interrupt()`."""


class DiffusionClassifierPipeline(HostedPipeline):
    """Classifies images by how well a diffusion model denoises them under each label (Li et al. 2023, arXiv 2303.16203).

    See `HostedPipeline` for `from_pipe`, `from_pretrained`, and what else the wrapper has.

    Example:
        >>> pipe = DiffusionClassifierPipeline.from_pretrained("digits")
        >>> out = pipe(images, labels=["two", "seven"], template="a {}")
        >>> out.labels, out.error_bounds, out.evaluations
        >>> pipe(images, prompts={"cat": ["a cat", "a kitten"], "dog": "a dog"}, reduce="min", policy="exhaustive")
    """

    @torch.no_grad()
    def __call__(
        self,
        images: Images,
        labels: Sequence[Label] | None = None,
        prompts: Mapping[Label, str | Sequence[str]] | None = None,
        template: str | Sequence[str] | None = None,
        policy: str | Policy = "race",
        budget: int | None = None,
        alpha: float = 0.05,
        plan: PairPlan | None = None,
        metric: str = "l2",
        reduce: str = "min",
        prior: Mapping[Label, float] | None = None,
        temperature: float | None = None,
        pmi: bool = False,
        hierarchy: Mapping[str, Sequence[Label]] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 128,
        fold: bool = True,
        return_dict: bool = True,
        callback: Callable[[DiffusionClassifierPipeline, int, Classification], None] | None = None,
        **conditioning: Any,
    ) -> DiffusionClassifierOutput | tuple[Any, ...]:
        """Classify images.

        Results depend on neither the batch size nor the order of images and labels (to rounding).

        Args:
            images: a picture or an iterable of them, taken as they are needed. PIL images and arrays (H, W, 3) of uint8 are scaled
                to cover the model's size and cut to its centre; arrays (H, W, 3) of floats in [0, 1] and tensors (3, H, W) in
                [-1, 1], or batches (B, ...) of either, must have that size.
            labels: two or more. Of a class-conditional model numbers or names of its classes.
            prompts: instead of labels, for text: prompt, or several, of each label.
            template: for text: what labels are put into, with `{}` in their place; "a photo of a {}" by default. Several give each
                label several prompts.
            policy: "race", "rounds", "exhaustive", "taylor", "dive" or "tree" (see `genkit.scoring.named.plan_policy`), or an
                object of `genkit.scoring`, whose arms are as in `Classification.verdict`.
            budget: network evaluations of one image, at most; those of `pmi` come on top.
            alpha: of policies given by name that race: probability of dropping the class that the whole plan would choose.
            plan: which pairs of noise level and noise are scored; `PairPlan()`, 64 pairs, by default.
            metric: "l2", "l1" or "huber".
            reduce: how the prompts of a label make one score: "min" (the best one), "mean" (of the losses, pair by pair),
                "logsumexp" (a mixture of the prompts; formed after the search, of whose choice the error bound speaks).
            prior: probability of each label, of any sum.
            temperature: T of the posterior softmax(-score / T + log prior) and hence the weight of the prior. By default 1 with
                "elbo" weights, which make scores nats, else 2 / (d L) for d values in a sample and levels that span L in log-SNR,
                which does so roughly; `genkit.scoring.fit_temperature` fits it to labelled images.
            pmi: subtract the null condition's score, so that the scores of different images can be compared; one more evaluation
                for each pair of the winner.
            hierarchy: for "tree": {prompt of a group: its labels}.
            height, width: in pixels; the model's own size by default.
            batch_size: network evaluations at a time.
            fold: compute what evaluations share once: equal up to rounding, and faster (see `genkit.scoring.Scorer`).
            callback: called as `callback(pipe, index, classification)` when an image is decided; images finish out of order.
            **conditioning: further inputs of the family's `condition`.

        Returns:
            `DiffusionClassifierOutput`, or a tuple of its values with `return_dict=False`.

        Raises:
            ValueError: inputs that do not fit the model or each other.
            FloatingPointError: a loss became NaN or infinite.
        """
        if reduce not in REDUCTIONS:
            raise unknown("reduction of prompts", reduce, REDUCTIONS)
        self._interrupt = False
        classes = classes_of(self.denoiser, labels, prompts, template=template, hierarchy=hierarchy, null=pmi, **conditioning)
        merge = reduce == "mean"
        arms = sum(map(len, classes.arms(merge))) - pmi
        policy, plan = plan_policy(
            policy, plan or PairPlan(), arms,
            cost=len(classes.cond) - pmi, budget=budget, alpha=alpha, children=classes.children_of_arms(merge),
        )  # fmt: skip
        shape = self.denoiser.latent_shape(height, width)
        policy.check(arms, plan.count)
        scorer = Scorer(self.denoiser, plan, metric=metric, batch_size=batch_size, fold=fold)
        temperature = _natural_temperature(scorer.pairs(shape)) if temperature is None else temperature
        reading = _Reading(classes, merge, reduce, temperature, _prior(classes, prior))
        results: dict[int, Classification] = {}
        count = 0

        def samples() -> Iterator[Tensor]:
            nonlocal count
            for x0 in self._encoded(pictures(images, self._picture_shape(shape))):
                count += 1
                yield x0

        def on_batch(evaluations: int) -> None:
            if self._interrupt:
                raise _Interrupted

        # Not every iterable has a length; infinity is what tqdm takes for that.
        total = len(images) if isinstance(images, Sized) and not is_single(images) else math.inf
        proof = Proof(self.host, known=self._audited)
        with proof, evaluating(self.denoiser.network), self.host.progress_bar(total=total) as bar:
            search = scorer.run(
                samples(), classes.cond, AgainstNull(inner=policy) if pmi else policy,
                offsets=reading.offsets, classes=classes.rows, merge=merge, progress=on_batch,
            )  # fmt: skip
            try:
                for index, verdict in search:
                    results[index] = reading(verdict)
                    bar.update()
                    if callback is not None:
                        callback(self, index, results[index])
            except _Interrupted:
                pass
        if not count:
            raise ValueError("There are no images. Give at least one.")
        self.attention = proof.to_dict()
        self.host.maybe_free_model_hooks()
        output = _collected([results.get(i) for i in range(count)])
        return output if return_dict else output.to_tuple()

    def _picture_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Shape (C, H, W) of the pictures for samples of a shape."""
        factor = self.denoiser.factor
        channels = 3 if self.denoiser.codec is not None else shape[0]
        return channels, shape[1] * factor, shape[2] * factor

    def _encoded(self, pictures: Iterator[Tensor]) -> Iterator[Tensor]:
        """Clean samples (c, h, w), float32, of pictures (C, H, W)."""
        while chunk := list(islice(pictures, _ENCODED)):
            yield from self.denoiser.encode(torch.stack(chunk).to(self.denoiser.device))


@dataclasses.dataclass(frozen=True, eq=False)
class _Reading:
    """Reads a policy's verdict: arms back to labels."""

    classes: Classes
    merge: bool
    reduce: str
    temperature: float
    prior: np.ndarray | None

    @property
    def offsets(self) -> np.ndarray | None:
        """What the prior adds to the losses of each arm; a group has the prior of all its labels."""
        if self.prior is None:
            return None
        groups = [self.prior[list(below)].sum() for below in self.classes.children.values()]
        by_class = -self.temperature * np.log([*self.prior, *groups, *[1.0] * self.classes.null])
        return np.concatenate([np.full(len(arms), v) for arms, v in zip(self.classes.arms(self.merge), by_class, strict=True)])

    def __call__(self, verdict: Verdict) -> Classification:
        labels, arms = self.classes.labels, self.classes.arms(self.merge)[: len(self.classes.labels)]
        scores = verdict.scores if self.offsets is None else verdict.scores - self.offsets
        groups = np.concatenate([np.full(len(row), c) for c, row in enumerate(arms)])
        with np.errstate(divide="ignore"):
            of_labels = reduce_prompts(scores[: len(groups)], groups, self.reduce, self.temperature)
        probabilities = posterior(of_labels, self.temperature, self.prior)
        winner = int(np.argmax(probabilities)) if self.reduce == "logsumexp" else int(groups[verdict.label])
        if self.classes.null:
            of_labels = of_labels - scores[-1]
        return Classification(
            label=labels[winner],
            scores=dict(zip(labels, of_labels.tolist(), strict=True)),
            probabilities=dict(zip(labels, probabilities.tolist(), strict=True)),
            error_bound=verdict.error_bound,
            evaluations=verdict.evaluations,
            verdict=verdict,
        )


def _natural_temperature(pairs: Pairs) -> float:
    """The T with which score / T is about -log p(x0 | c): mean error x d / 2 x span of the log-SNR."""
    if pairs.plan.weighting == "elbo":
        return 1.0
    log_snr = torch.as_tensor(pairs.level.log_snr)
    log_snr = log_snr[torch.isfinite(log_snr)]
    span = float(log_snr.max() - log_snr.min()) if len(log_snr) > 1 else 0.0
    return 2 / (math.prod(pairs.shape) * max(span, 1.0))


def _prior(classes: Classes, prior: Mapping[Label, float] | None) -> np.ndarray | None:
    """The prior (C,) of the labels, of sum 1."""
    if prior is None:
        return None
    given = {str(label): float(value) for label, value in prior.items()}
    wrong = [label for label in given if label not in classes.labels]
    if wrong:
        raise ValueError(f"The prior names {wrong[0]!r}, but there is no such label.")
    missing = [label for label in classes.labels if label not in given]
    if missing:
        raise ValueError(f"The prior says nothing of {missing[0]!r}. Give a probability for every label.")
    values = np.array([given[label] for label in classes.labels])
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"The prior {given} must be positive for every label.")
    return values / values.sum()


def _collected(results: list[Classification | None]) -> DiffusionClassifierOutput:
    return DiffusionClassifierOutput(
        labels=[None if r is None else r.label for r in results],
        scores=[None if r is None else r.scores for r in results],
        probabilities=[None if r is None else r.probabilities for r in results],
        error_bounds=[None if r is None else r.error_bound for r in results],
        evaluations=[None if r is None else r.evaluations for r in results],
        verdicts=[None if r is None else r.verdict for r in results],
    )
