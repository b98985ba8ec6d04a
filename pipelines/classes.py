"""What a diffusion classifier tells apart: labels, the conditions that stand for them, groups of labels, the null condition."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from genkit.denoisers import Cond, Denoiser

Label = int | str
DEFAULT_TEMPLATE = "a photo of a {}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """Conditions by class: of the labels first, then of the groups of a hierarchy, then the null condition if it is wanted.

    Args:
        labels: names, in the order of the classes.
        rows: rows of `cond` of each class.
        children: classes of each group, by its number as a class.
        null: whether the last class is the null condition.
    """

    labels: list[str]
    cond: Cond
    rows: list[list[int]]
    children: dict[int, tuple[int, ...]]
    null: bool

    def arms(self, merge: bool) -> list[list[int]]:
        """Arms of each class: itself, or one for each of its rows."""
        return [[c] for c in range(len(self.rows))] if merge else self.rows

    def children_of_arms(self, merge: bool) -> dict[int, tuple[int, ...]]:
        """`children` in numbers of arms."""
        arms = self.arms(merge)
        return {arms[group][0]: tuple(arm for c in below for arm in arms[c]) for group, below in self.children.items()}


def classes_of(
    denoiser: Denoiser,
    labels: Sequence[Label] | None,
    prompts: Mapping[Label, str | Sequence[str]] | None,
    *,
    template: str | Sequence[str] | None = None,
    hierarchy: Mapping[str, Sequence[Label]] | None = None,
    null: bool = False,
    **conditioning: Any,
) -> Classes:
    """The classes of a call, encoded.

    Raises:
        ValueError: see `DiffusionClassifierPipeline`.
    """
    takes = inspect.signature(denoiser.condition).parameters
    if getattr(denoiser, "num_classes", 0) is None or not {"prompts", "labels"} & set(takes):
        raise ValueError(
            f"This {denoiser.family} model is unconditional, so every class would have the same loss. "
            "Use a class-conditional or a text-to-image model."
        )
    if (labels is None) == (prompts is None):
        raise ValueError("Give either labels, or prompts = {label: prompt}.")
    given = list(prompts or {}) if labels is None else labels
    names = check_labels(given)
    if "prompts" in takes:
        texts = fill_template(names, template) if prompts is None else _given(prompts, template)
        groups = dict(hierarchy or {})
        cond = denoiser.condition(prompts=[text for row in (*texts, *([g] for g in groups)) for text in row], **conditioning)
        lengths = [len(row) for row in texts] + [1] * len(groups)
    else:
        if prompts is not None or template is not None or hierarchy:
            raise ValueError(
                f"{denoiser.family} is conditioned on classes, not on text: give labels, without prompts or hierarchy."
            )
        groups = {}
        cond = denoiser.condition(labels=[_class(denoiser, label) for label in given], **conditioning)
        lengths = [1] * len(names)
    stops = list(accumulate(lengths))
    rows = [list(range(stop - length, stop)) for length, stop in zip(lengths, stops, strict=True)]
    _require_distinct(names, cond, rows[: len(names)])
    if null:
        rows.append([len(cond)])
        cond = _with_null(cond)
    return Classes(labels=names, cond=cond, rows=rows, children=_children(names, groups), null=null)


def check_labels(labels: Sequence[Label]) -> list[str]:
    """The labels as names.

    Raises:
        ValueError: no list of names and numbers, fewer than two, one that is empty or there twice.
    """
    if isinstance(labels, str) or not all(isinstance(label, str | int) for label in labels):
        raise ValueError(f"labels={labels!r:.80} is no list of names or class numbers.")
    names = [str(label) for label in labels]
    if len(names) < 2:
        raise ValueError(f"There is nothing to tell apart: {names or 'no labels'}. Give at least two labels.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"The label {twice[0]!r} is there twice. Give each once.")
    if not all(name.strip() for name in names):
        raise ValueError("A label is empty. Name every class.")
    return names


def fill_template(names: Sequence[str], template: str | Sequence[str] | None) -> list[list[str]]:
    """The prompts of each label: every template with the label in place of `{}`, as it is.

    Raises:
        ValueError: a template without `{}`.
    """
    templates = [template or DEFAULT_TEMPLATE] if template is None or isinstance(template, str) else list(template)
    for text in templates:
        if "{}" not in text:
            raise ValueError(f"The template {text!r} has no {{}}, where the label goes. Write it as in 'a photo of a {{}}'.")
    return [[text.replace("{}", name) for text in templates] for name in names]


def _given(prompts: Mapping[Label, str | Sequence[str]], template: str | Sequence[str] | None) -> list[list[str]]:
    if template is not None:
        raise ValueError("Both prompts and a template were given. Prompts are taken as they are; a template goes with labels.")
    texts = [[value] if isinstance(value, str) else list(value) for value in prompts.values()]
    for label, row in zip(prompts, texts, strict=True):
        if not row or not all(isinstance(text, str) for text in row):
            raise ValueError(f"The prompts {row!r} of {label!r} are no strings. Give one or several.")
    return texts


def _class(denoiser: Denoiser, label: Label) -> Label:
    """A class number that came as text, as the number; names of the pipeline win."""
    known = getattr(denoiser.pipe, "labels", None) or {}
    return int(label) if isinstance(label, str) and label not in known and label.isdecimal() else label


def _require_distinct(names: list[str], cond: Cond, rows: list[list[int]]) -> None:
    """Refuse two labels that the model cannot tell apart, since it knows the words of neither or takes them for the same class."""
    seen: dict[bytes, str] = {}
    for name, row in zip(names, rows, strict=True):
        key = b"".join(_bytes(value[row]) for value in cond.tensors.values())
        if key in seen:
            raise ValueError(
                f"The labels {seen[key]!r} and {name!r} mean the same to this model (equal prompts, words that it does "
                "not know, or that come too late in a long prompt). Leave one out, or say what they look like with prompts."
            )
        seen[key] = name


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _with_null(cond: Cond) -> Cond:
    if cond.null_tensors is None:
        raise ValueError("pmi compares with the null condition, which this model does not have. Switch it off.")
    null = cond[0].null()
    return Cond({name: torch.cat([value, null.tensors[name]]) for name, value in cond.tensors.items()})


def _children(names: list[str], groups: Mapping[str, Sequence[Label]]) -> dict[int, tuple[int, ...]]:
    number = {name: i for i, name in enumerate(names)}
    children = {}
    for i, (group, members) in enumerate(groups.items(), len(names)):
        unknown = [str(label) for label in members if str(label) not in number]
        if unknown:
            raise ValueError(f"The hierarchy puts {unknown[0]!r} under {group!r}, but there is no such label.")
        if not members or isinstance(members, str):
            raise ValueError(f"The hierarchy has {members!r} under {group!r}. Give a list of labels.")
        children[i] = tuple(number[str(label)] for label in members)
    missing = set(range(len(names))) - {c for below in children.values() for c in below}
    if children and missing:
        raise ValueError(f"The hierarchy leaves out {names[min(missing)]!r}. Put every label into a group.")
    return children
