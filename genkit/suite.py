"""The table of measured figures: where each comes from, within what interval it must come again, and where it is shown.

`benchmarks/suite.json` of a checkout has

    intervals   what each kind of interval means, and why it is as wide as it is
    commands    by name: `run`, a command line of the checkout ({out} is the file for its JSON, which else is its stdout; {NAME} is
                a folder that the user must have, which `needs` describes); `recorded`, the committed JSON; `at`, `recorded_at`:
                where in them the figures begin
    figures     `name`, `command`, `path` (several are averaged), perhaps `over` (the path of a divisor), `value`, `low`, `high`,
                `interval` (its kind and, for shares, of how many), perhaps `baseline` (another figure's name), and `shown`: how a
                document shows it, with the value in Python's format (`scale` 100 for per cent); several where several do
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TABLE = Path("benchmarks/suite.json")
_SHOWN_IN = ("README.md", "docs/*.md")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What measures figures, see above."""

    run: str
    recorded: str
    needs: str | None = None
    at: tuple[str, ...] = ()
    recorded_at: tuple[str, ...] = ()

    def line(self, out: Path, folders: Mapping[str, str]) -> list[str]:
        """The arguments, with `python` as this interpreter."""
        words = [word.format_map({"out": str(out), **folders}) for word in shlex.split(self.run)]
        return [sys.executable if word == "python" else word for word in words]

    @property
    def folder(self) -> str | None:
        """The name of the folder that the user must have."""
        return next((name for _, name, _, _ in string.Formatter().parse(self.run) if name not in (None, "out")), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of the table, see above."""

    name: str
    command: str
    path: tuple[Any, ...]
    value: float
    low: float
    high: float
    interval: str
    shown: str | tuple[str, ...]
    over: tuple[Any, ...] = ()
    baseline: str | None = None
    scale: float = 1.0

    def of(self, document: Any) -> float:
        """Its value in a command's JSON.

        Raises:
            ValueError: it is not there.
        """
        paths = self.path if self.path and isinstance(self.path[0], list) else [self.path]
        value = sum(_number(document, path, self.name) for path in paths) / len(paths)
        return value / _number(document, self.over, self.name) if self.over else value

    def row(self, value: float) -> dict[str, Any]:
        """What `genkit eval suite --json` says of a value."""
        return {"name": self.name, "value": value, "low": self.low, "high": self.high, "ok": self.low <= value <= self.high}

    def texts(self, value: float) -> list[str]:
        """How documents show a value."""
        return [shown.format(value * self.scale) for shown in self.patterns]

    @property
    def patterns(self) -> tuple[str, ...]:
        """`shown`, one or several."""
        return (self.shown,) if isinstance(self.shown, str) else self.shown


@dataclasses.dataclass(frozen=True)
class Suite:
    """The table of a checkout.

    Example:
        >>> suite = Suite.load(find_checkout())
        >>> [figure.row(suite.recorded(figure))["ok"] for figure in suite.figures]
    """

    root: Path
    intervals: dict[str, str]
    commands: dict[str, Command]
    figures: tuple[Figure, ...]

    @classmethod
    def load(cls, root: Path) -> Suite:
        """The table below a checkout's root.

        Raises:
            OSError: there is none.
            ValueError: it is damaged: a field that is missing or unknown, a command or baseline that is none, a name twice.
        """
        file = root / TABLE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            commands = {name: Command(**_tuples(row)) for name, row in content["commands"].items()}
            figures = tuple(Figure(**_tuples(row)) for row in content["figures"])
            intervals = dict(content["intervals"])
        except OSError as error:
            raise OSError(f"The table {str(file)!r} cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}).") from error
        names = [figure.name for figure in figures]
        for figure in figures:
            known = figure.command in commands and figure.interval.split()[0] in intervals
            if not known or figure.baseline not in (None, *names) or names.count(figure.name) > 1:
                raise ValueError(
                    f"{file} is damaged: the figure {figure.name!r} is there twice, or what it refers to is not there."
                )
        return cls(root, intervals, commands, figures)

    def chosen(self, only: Sequence[str]) -> list[Figure]:
        """Figures whose name or command contains one of the texts; all without any.

        Raises:
            ValueError: a text that is in none.
        """
        from genkit.errors import unknown

        for text in only:
            if not any(text in f.name or text in f.command for f in self.figures):
                raise unknown("figure", text, [*self.commands])
        return [f for f in self.figures if not only or any(text in f.name or text in f.command for text in only)]

    def recorded(self, figure: Figure) -> float:
        """A figure's value in the committed JSON.

        Raises:
            OSError, ValueError: that is missing or damaged.
        """
        command = self.commands[figure.command]
        return figure.of(_at(_read(self.root / command.recorded), command.recorded_at, figure.name))

    def measure(self, name: str, out: Path, folders: Mapping[str, str]) -> Any:
        """Run a command in the checkout; its JSON.

        Args:
            out: the file for its JSON.
            folders: what the user has, by name.

        Raises:
            RuntimeError: the command failed; the message has the end of what it said.
        """
        command = self.commands[name]
        done = subprocess.run(command.line(out, folders), cwd=self.root, capture_output=True, text=True)
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
            raise RuntimeError(f"{command.run!r} failed with exit code {done.returncode}: {said:.300}")
        if "{out}" not in command.run:
            out.write_text(done.stdout, encoding="utf-8")
        return self.result(name, out)

    def result(self, name: str, out: Path) -> Any:
        """Where the figures begin in the JSON that a command has left.

        Raises:
            OSError, ValueError: that is missing or damaged.
        """
        return _at(_read(out), self.commands[name].at, name)

    def documents(self) -> str:
        """The text of the README and the pages, without line breaks."""
        files = [file for pattern in _SHOWN_IN for file in sorted(self.root.glob(pattern))]
        return " ".join(" ".join(file.read_text(encoding="utf-8") for file in files).split())


def find_checkout(folder: Path | None = None) -> Path:
    """The checkout of a folder, or that around the current folder or this package.

    Raises:
        FileNotFoundError: none of them has the table.
    """
    places = [folder] if folder is not None else [Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]]
    found = next((place for place in places if (place / TABLE).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"There is no {TABLE} here. Run the suite in a checkout, or name it: --checkout DIR.")
    return found


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"The figures {str(file)!r} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"The figures {str(file)!r} are no JSON ({error}).") from error


def _at(document: Any, path: Sequence[Any], what: str) -> Any:
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"The JSON of {what!r} has nothing at {' / '.join(map(str, path))}.") from None
    return document


def _number(document: Any, path: Sequence[Any], what: str) -> float:
    value = _at(document, path, what)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The JSON of {what!r} has no number at {' / '.join(map(str, path))}, but {value!r:.100}.")
    return float(value)
