"""Accuracy with intervals: plain, class-balanced, and of the worst group.

Of k hits in n the 95 % interval is Wilson's (1927), which is right for small groups too. The class-balanced accuracy is the mean of
the K accuracies p_i of the classes; its interval comes from theirs, [l_i, u_i], by the method of variance estimates recovery (Zou &
Donner 2008):

    L = p - sqrt(sum_i (p_i - l_i)^2) / K        U = p + sqrt(sum_i (u_i - p_i)^2) / K
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from genkit.metrics.estimate import Estimate


def accuracy(predicted: Any, labels: Any) -> Estimate:
    """Share of `predicted` (N,) that equal `labels` (N,): arrays, tensors or lists of numbers or names.

    Raises:
        ValueError: none at all, or different lengths.

    Example:
        >>> accuracy(["two", "seven"], ["two", "two"])
        Estimate(value=0.5, low=0.0945..., high=0.9054..., count=2)
    """
    return _of(_hits(predicted, labels))


def group_accuracy(predicted: Any, labels: Any, groups: Sequence[Hashable] | Any) -> dict[Any, Estimate]:
    """The accuracy of each group; `groups` (N,) has the group of each row. Sorted by group.

    Raises:
        ValueError: none at all, or different lengths.
    """
    hits, groups = _hits(predicted, labels), np.asarray(groups)
    if groups.shape != hits.shape:
        raise ValueError(f"There are groups of shape {groups.shape} for {len(hits)} predictions. Give one for each.")
    return {group.item(): _of(hits[groups == group]) for group in np.unique(groups)}


def class_balanced_accuracy(predicted: Any, labels: Any) -> Estimate:
    """The mean of the accuracies of the classes that occur in `labels`, each counted alike.

    Raises:
        ValueError: none at all, or different lengths.
    """
    classes = group_accuracy(predicted, labels, labels).values()
    p, low, high = (np.array([getattr(each, name) for each in classes]) for name in ("value", "low", "high"))
    return Estimate(
        float(p.mean()),
        float(p.mean() - np.linalg.norm(p - low) / len(p)),
        float(p.mean() + np.linalg.norm(high - p) / len(p)),
        sum(each.count for each in classes),
    )


def worst_group_accuracy(predicted: Any, labels: Any, groups: Sequence[Hashable] | Any) -> tuple[Any, Estimate]:
    """The group with the lowest accuracy, and that; the first of several. The interval is that group's, as if it were the only one.

    Raises:
        ValueError: none at all, or different lengths.
    """
    found = group_accuracy(predicted, labels, groups)
    worst = min(found, key=lambda group: found[group].value)
    return worst, found[worst]


def _hits(predicted: Any, labels: Any) -> np.ndarray:
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != labels.shape or not len(labels):
        raise ValueError(f"Give a label for each prediction, at least one; got shapes {predicted.shape} and {labels.shape}.")
    return predicted == labels


def _of(hits: np.ndarray) -> Estimate:
    found = binomtest(int(hits.sum()), len(hits))
    interval = found.proportion_ci(method="wilson")
    return Estimate(float(found.statistic), float(interval.low), float(interval.high), len(hits))
