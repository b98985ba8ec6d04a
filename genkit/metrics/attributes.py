"""Do pictures of `digits` show what was asked for? The judge reads digit, ink and paper, and is compared with the captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.data.digits import DIGITS, LABELS, read_caption
from genkit.metrics.accuracy import accuracy
from genkit.metrics.estimate import Estimate


def asked_for(caption: str | None, label: str | int | None = None) -> dict[str, int]:
    """Class indices of what a picture should show, by attribute: what its caption names, or the digit that is its label.

    Example:
        >>> asked_for("a red seven"), asked_for(None, "seven")
        ({'digit': 7, 'ink': 0}, {'digit': 7})
    """
    named = {} if caption is None else read_caption(caption)
    if named or label is None:
        return named
    text = str(label)
    if text in DIGITS:
        return {"digit": DIGITS.index(text)}
    return {"digit": int(text)} if text.isdecimal() and int(text) < len(DIGITS) else {}


def attribute_accuracy(judge: Any, features: Tensor, asked: Sequence[Mapping[str, int]]) -> dict[str, Estimate]:
    """How often the judge reads what was asked for, by attribute; of an attribute that no picture was asked for there is nothing.

    Args:
        judge: an `AttributeClassifier` of digit, ink and paper.
        features: its features (N, D) of the pictures.
        asked: `asked_for` each picture; pictures that an attribute was not asked of do not count for it.

    Raises:
        ValueError: not as many features as pictures.
    """
    if len(features) != len(asked):
        raise ValueError(f"There are features of {len(features)} pictures for {len(asked)}. Give one for each.")
    found = {}
    for name in LABELS:
        rows = [i for i, each in enumerate(asked) if name in each]
        if rows:
            head = judge.heads[name]
            with torch.no_grad():
                read = head(features[rows].to(head.weight)).argmax(1)
            found[name] = accuracy(read.tolist(), [asked[i][name] for i in rows])
    return found
