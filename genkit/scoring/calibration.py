"""Scores to probabilities: p(c | x) = softmax(-score_c / T + log p(c)).

With `elbo` weights scores are nats and T = 1 would be right for a perfect model; T is fitted on held-out data otherwise
(Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp

REDUCTIONS = ("min", "mean", "logsumexp")


def posterior(scores: np.ndarray, temperature: float = 1.0, prior: np.ndarray | None = None) -> np.ndarray:
    """Probabilities (..., K) of scores (..., K), lower is better; an infinite score has probability 0.

    Args:
        temperature: T, in the unit of the scores.
        prior: p(c) (K,), of any sum; uniform by default.

    Raises:
        ValueError: a temperature or a prior that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    logits = -np.asarray(scores, dtype=float) / temperature
    if prior is not None:
        prior = np.asarray(prior, dtype=float)
        if not (prior > 0).all():
            raise ValueError(f"The prior {prior.tolist()} must be positive for every class.")
        logits = logits + np.log(prior)
    return np.exp(log_softmax(logits, axis=-1))


def fit_temperature(scores: np.ndarray, labels: np.ndarray, prior: np.ndarray | None = None) -> float:
    """The T that makes the true classes of held-out data most likely.

    Args:
        scores: (N, K), finite.
        labels: (N,) true classes.

    Raises:
        ValueError: infinite scores, labels out of range, or no data.

    Example:
        >>> T = fit_temperature(scores, labels)
        >>> posterior(new_scores, T)
    """
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels)
    if scores.ndim != 2 or not len(scores) or len(labels) != len(scores):
        raise ValueError(f"Give scores (N, K) and labels (N,), got {scores.shape} and {labels.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError("Some scores are infinite: a policy that leaves classes out cannot be calibrated. Use race or exhaustive.")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"Labels run from 0 to {scores.shape[1] - 1}, got {labels.min()} to {labels.max()}.")
    scores = scores - scores.min(1, keepdims=True)
    unit = scores[scores > 0].mean() if (scores > 0).any() else 1.0

    def loss(log_t: float) -> float:
        return -np.log(np.maximum(posterior(scores, unit * np.exp(log_t), prior)[np.arange(len(labels)), labels], 1e-300)).mean()

    return float(unit * np.exp(minimize_scalar(loss, bounds=(-9, 5), method="bounded").x))


def reduce_prompts(scores: np.ndarray, groups: np.ndarray, how: str, temperature: float = 1.0) -> np.ndarray:
    """Class scores (C,) of prompt scores (K,).

    Args:
        groups: (K,) class of each prompt, 0 to C - 1.
        how: "min", "mean", or "logsumexp": -T ln mean exp(-score / T), the likelihood of a mixture of the prompts.
    """
    classes = [scores[groups == c] for c in range(int(groups.max()) + 1)]
    if how == "min":
        return np.array([s.min() for s in classes])
    if how == "mean":
        return np.array([s.mean() for s in classes])
    if how != "logsumexp":
        from genkit.errors import unknown

        raise unknown("reduction of prompts", how, REDUCTIONS)
    return np.array([-temperature * (logsumexp(-s / temperature) - np.log(len(s))) for s in classes])
