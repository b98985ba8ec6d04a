"""Published figures, and how to get them again: what a figure needs, which commands make it, and how it compares.

A figure is a TOML file of `recipes/reproduce`:

    [figure]    system, what, source, evidence (how well the value is known), gpu_time; value, unit and tolerance where there is a
                value to compare with; caution (what is not as in the paper)
    [needs]     model (where the checkpoint comes from), data (what the folder holds), files (of that folder);
                gap: what no command of genkit does, or nobody published
    [run]       commands: lines of genkit; result: where the last one's JSON has the figure, as in metrics.fid.value; scale: of it
                classes: number of classes

In commands {model} and {data} are the folders, {work} is where results go, {recipes} holds the recipes of distillations, and
{classes} are the numbers of the classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from genkit.errors import unknown
from genkit.files import read_toml


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A published figure.

    Args:
        name: of its file.
        system, what: whose figure of what.
        source: paper and table.
        evidence: how well the value is known.
        gpu_time: what it takes, and whether that was measured.
        model, data: what has to be got, for people.
        commands: command lines of genkit with placeholders, in their order.
        files: what the folder of data must hold.
        value, tolerance, unit: expected, by how much it may differ, and in what; None where no value is known.
        caution: what is not as in the paper.
        gap: why the figure cannot come out of genkit alone, or at all.
        result, scale: where the last command's JSON has it, and the factor that brings it to the unit.
        classes: number of classes of {classes}.

    Raises:
        ValueError: a value without a result or a gap, commands that are no list of texts, or numbers that are none.
    """

    name: str
    system: str
    what: str
    source: str
    evidence: str
    gpu_time: str
    model: str
    data: str
    commands: tuple[str, ...]
    files: tuple[str, ...] = ()
    value: float | None = None
    tolerance: float = 0.0
    unit: str = ""
    caution: str = ""
    gap: str = ""
    result: str = ""
    scale: float = 1.0
    classes: int = 0

    def __post_init__(self) -> None:
        numbers = {"tolerance": self.tolerance, "scale": self.scale, "classes": self.classes, "value": self.value or 0.0}
        texts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in numbers}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e9:
                raise ValueError(f"{name} of the figure {self.name!r} must be a number from 0 to 1e9; got {value!r:.80}.")
        for name, value in texts.items():
            several = name in ("commands", "files")
            if not all(isinstance(part, str) for part in (value if several else [value])):
                raise ValueError(f"{name} of the figure {self.name!r} must be {'texts' if several else 'text'}; got {value!r:.80}.")
        if not self.commands or (self.value is not None and not self.result and not self.gap):
            raise ValueError(f"The figure {self.name!r} needs commands, and with a value a result, or a gap that says why not.")

    @property
    def expected(self) -> str:
        """The value with its tolerance, for people."""
        return "not known" if self.value is None else f"{self.value:g} {self.unit} +- {self.tolerance:g}"

    def missing(self, model: str | None, data: Path | None) -> list[str]:
        """What is not at hand, in sentences; empty if the commands can run."""
        lacks = []
        if model is None and self._uses("{model}"):
            lacks.append(f"the checkpoint, --model DIR: {self.model}")
        if data is None and self._uses("{data}"):
            lacks.append(f"the data, --data DIR: {self.data}")
        if data is not None:
            lacks += [f"{str(data / name)!r} of the data: {self.data}" for name in self.files if not (data / name).exists()]
        return lacks

    def lines(self, model: str | None, data: Path | None, work: Path) -> list[list[str]]:
        """The command lines of genkit; what is not at hand keeps its placeholder."""
        values = {
            "model": model, "data": None if data is None else str(data), "work": str(work), "recipes": str(files("genkit.recipes")),
            "classes": ",".join(map(str, range(self.classes))),
        }  # fmt: skip
        known = {f"{{{name}}}": value for name, value in values.items() if value is not None}
        return [[_filled(part, known) for part in shlex.split(command)] for command in self.commands]

    def measured(self, document: dict[str, Any]) -> float | None:
        """The figure in the last command's JSON; None if this figure has no place in it.

        Raises:
            ValueError: the JSON lacks it.
        """
        if not self.result:
            return None
        value: Any = document
        for key in self.result.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"The last command of {self.name!r} gave no number {self.result!r} but {value!r:.80}.")
        return value * self.scale

    def agrees(self, measured: float | None) -> bool | None:
        """Whether a measured figure is within the tolerance; None if there is nothing to compare."""
        if measured is None or self.value is None:
            return None
        return abs(measured - self.value) <= self.tolerance + 1e-12

    def _uses(self, placeholder: str) -> bool:
        return any(placeholder in command for command in self.commands)


def figures() -> list[Figure]:
    """The figures that genkit brings, by name."""
    return [read_figure(name) for name in names()]


def names() -> list[str]:
    """Their names, sorted."""
    return sorted(
        file.name.removesuffix(".toml") for file in (files("genkit.recipes") / "reproduce").iterdir() if file.name[-5:] == ".toml"
    )


def read_figure(name: str) -> Figure:
    """A figure by name, or of a TOML file of yours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, or a file that is none of a figure.
    """
    file = Path(name)
    if file.suffix != ".toml":
        if name not in names():
            raise unknown("figure", name, names())
        file = Path(str(files("genkit.recipes") / "reproduce" / f"{name}.toml"))
    elif not file.is_file():
        raise FileNotFoundError(f"There is no file {name!r}.")
    content = read_toml(file)
    tables = [content.get(table, {}) for table in ("figure", "needs", "run")]
    if len(content) > 3 or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{str(file)!r} has other parts than the tables figure, needs and run.")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for table in tables for key, value in table.items()
    }
    known = [field.name for field in dataclasses.fields(Figure)]
    for key in values:
        if key not in known or key == "name":
            raise unknown("entry of a figure", key, [n for n in known if n != "name"])
    try:
        return Figure(name=file.stem, **values)
    except TypeError as error:
        raise ValueError(f"{str(file)!r} is no whole figure: {error}.") from error


def reproduce(
    figure: Figure, model: str | None, data: Path | None, work: Path, run: Callable[[Sequence[str]], str]
) -> dict[str, Any]:
    """Run a figure's commands, and compare.

    Args:
        run: runs a line of genkit with `--json`, and gives what it prints on stdout.

    Returns:
        What was measured: "measured" and "agrees", either None where there is nothing to measure or compare.

    Raises:
        ValueError: a command failed, or its output has no figure.
    """
    document: dict[str, Any] = {}
    for line in figure.lines(model, data, work):
        text = run([*line, "--json"])
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`genkit {shlex.join(line)}` printed no JSON.") from error
    measured = figure.measured(document)
    return {"measured": measured, "agrees": figure.agrees(measured)}


def _filled(text: str, values: dict[str, str]) -> str:
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text
