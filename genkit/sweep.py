"""Seeds, sweeps, and the table of images that they span."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from genkit.errors import unknown
from genkit.recipe import Recipe

MAX_IMAGES = 1_000_000
FOLD = 8  # a single row that is longer than this is folded
FIELDS = {"steps": int, "cfg": float, "eta": float, "sampler": str, "negative": str}


def parse_seeds(text: str) -> list[int]:
    """Seeds from "0-15" or "1,2,5-10": in the order given, each once.

    Raises:
        ValueError: malformed, a range that runs backwards, or more than a million seeds.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})\s*(?:-\s*(\d{1,19})\s*)?", part, re.ASCII)
        if not match:
            raise ValueError(f"Seeds {text!r}: {part!r} is neither a number nor a range. Write for instance 0-15 or 1,2,5-10.")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise ValueError(f"Seeds {text!r}: the range {part.strip()!r} runs backwards. Write {last}-{first}.")
        if last - first + len(seeds) >= MAX_IMAGES:
            raise ValueError(f"Seeds {text!r}: that is more than {MAX_IMAGES:,} seeds. Split the run.")
        seeds.update(dict.fromkeys(range(first, last + 1)))
    return list(seeds)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in pixels from "64x48"; "64" is a square.

    Raises:
        ValueError: malformed.
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip(), re.ASCII)
    if not match:
        raise ValueError(f"Size {text!r} is not WIDTHxHEIGHT in pixels. Write for instance 64x48.")
    return int(match[1]), int(match[2] or match[1])


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting and the values it takes: a field of the recipe, or a parameter of a guidance.

    A guidance goes by its name, a function by its own: `classifier.scale`, `myfunction.scale`; of several with one name,
    `classifier#2.scale` is the second.
    """

    key: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """An axis from "cfg=1,3,5"; a value with commas is quoted.

        Raises:
            ValueError: malformed, an unknown key, or no values.
        """
        from genkit.guidance.registry import items

        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"Sweep {text!r} is not key=a,b,c. Write for instance cfg=1,3,5.")
        if key not in FIELDS and "." not in key:
            raise unknown("sweep key", key, [*FIELDS, "GUIDANCE.PARAMETER"])
        parts = tuple(dict.fromkeys(items(values)))
        if "" in parts and key != "negative":
            raise ValueError(f"Sweep {text!r} has an empty value. Write for instance {key}=1,3,5.")
        return cls(key, parts)

    def apply(self, recipe: Recipe, value: str) -> Recipe:
        """The recipe with this setting at one of the values.

        Raises:
            ValueError: a value of the wrong type or range, or the recipe lacks the guidance.
        """
        from genkit.guidance.registry import unquote

        if self.key not in FIELDS:
            return dataclasses.replace(recipe, guidance=_with_parameter(recipe.guidance, self.key, value))
        try:
            converted = FIELDS[self.key](unquote(value))
        except ValueError:
            raise ValueError(f"Sweep of {self.key}: {value!r} is not a number.") from None
        return dataclasses.replace(recipe, **{self.key: converted})


def _with_parameter(specs: Sequence[str], key: str, value: str) -> tuple[str, ...]:
    """Guidance specs with one parameter of one of them replaced or added."""
    from genkit.guidance.registry import head, items

    which, _, parameter = key.rpartition(".")
    name, _, number = which.partition("#")
    places = [i for i, spec in enumerate(specs) if head(spec)[0].rpartition(":")[2] == name]
    wanted = places[int(number) - 1 : int(number)] if number.isdecimal() and int(number) else [] if number else places
    if not wanted:
        found = "there is none" if not places else f"of {name!r} there are {len(places)}"
        raise ValueError(f"Sweep of {key!r} needs exactly one guidance {which!r}, but {found}. Add --guidance {name}:...")
    if len(wanted) > 1:
        raise ValueError(
            f"Sweep of {key!r}: there are {len(places)} guidances {name!r}. Say which: {name}#2.{parameter} is the second."
        )
    known, rest = head(specs[wanted[0]])
    others = [item for item in items(rest) if item and item.partition("=")[0].strip() != parameter]
    changed = f"{known}:{','.join([*others, f'{parameter}={value}'])}"
    return tuple(changed if i == wanted[0] else spec for i, spec in enumerate(specs))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All the images of a run, row by row, as the contact sheet shows them.

    Args:
        recipes: up to R x C of them, row by row; only the last row may be short.
        rows, columns: their labels, R and C.
        title: what all have in common.
    """

    recipes: tuple[Recipe, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    title: str


def plan(subjects: Sequence[Recipe], seeds: Sequence[int], axes: Sequence[Axis] = ()) -> Plan:
    """Every subject at every point of the sweep with every seed.

    Rows are subjects and sweep points, columns are seeds; with a single seed the last axis takes the columns, and a single
    long row is folded into a square.

    Args:
        subjects: recipes that differ in what is drawn.

    Raises:
        ValueError: nothing to do, an axis twice, too many images, or values that do not fit.
    """
    if not subjects or not seeds:
        raise ValueError("There is nothing to do: give at least one prompt and one seed.")
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ValueError(f"A key is swept twice: {', '.join(keys)}. Put its values in one --sweep.")
    count = len(subjects) * len(seeds) * math.prod(len(axis.values) for axis in axes)
    if count > MAX_IMAGES:
        raise ValueError(f"That is {count:,} images, more than {MAX_IMAGES:,}. Split the run.")

    recipes, rows = [], []
    across = axes[-1:] if len(seeds) == 1 else []
    down = axes[: len(axes) - len(across)]
    for subject in subjects:
        for point in itertools.product(*(axis.values for axis in axes)):
            recipe = subject
            for axis, value in zip(axes, point, strict=True):
                recipe = axis.apply(recipe, value)
            recipes += [dataclasses.replace(recipe, seed=seed) for seed in seeds]
        for point in itertools.product(*(axis.values for axis in down)):
            parts = [subject.subject] if len(subjects) > 1 else []
            rows.append(", ".join(parts + [f"{axis.key}={value}" for axis, value in zip(down, point, strict=True)]))
    columns = [f"{across[0].key}={value}" for value in across[0].values] if across else [f"seed {seed}" for seed in seeds]
    title = subjects[0].subject if len(subjects) == 1 else ""
    if len(rows) == 1 and len(columns) > FOLD:
        rows, columns = _fold(columns)
    return Plan(tuple(recipes), tuple(rows), tuple(columns), title)


def _fold(columns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Row and column labels when one long row becomes a square."""
    width = math.ceil(math.sqrt(len(columns)))
    parts = [columns[start : start + width] for start in range(0, len(columns), width)]
    return [part[0] if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts], [""] * width
