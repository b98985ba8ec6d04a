"""Damaged and hostile inputs, and what a reader makes of them.

    flipped     a valid file with a few of its bytes changed, cut out, doubled, or exchanged with those of another
    altered     a valid JSON or TOML document with some values replaced by hostile ones, left out, nested or doubled
    strategies  hypothesis: both of these, driven by its choices so that a failure shrinks, and anything at all

`attempt` reads one input in at most `SECONDS` and says what came of it. The readers are in `tests.readers`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import signal
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from hypothesis import strategies as st

SECONDS = 10  # that a reader may take for one input
Form = Literal["bytes", "json", "jsonl", "toml", "text"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A function that reads what may come from anyone.

    Args:
        read: takes the path of the input.
        valid: inputs that are read without an error.
        name: of the input's file.
        form: what else than bytes is worth changing.
        beside: further files of its folder, by name.
        wrap: makes the file of an input, for instance a container with the right checksum around it.
        errors: what `read` may raise.
    """

    read: Callable[[Path], Any]
    valid: tuple[bytes, ...]
    name: str
    form: Form = "bytes"
    beside: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    wrap: Callable[[bytes], bytes] = bytes
    errors: tuple[type[Exception], ...] = (ValueError, OSError)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Args:
        kind: "read", "refused" (by a documented error), "undocumented" or "slow".
        seconds: it took.
        error: type and message, with the innermost place in genkit.
    """

    kind: str
    seconds: float
    error: str = ""


class _TooSlow(BaseException):
    pass


def attempt(reader: Reader, content: bytes, folder: Path) -> Outcome:
    """Read an input that is written to `folder`, which the reader's other files are in (`prepared`)."""
    path = folder / reader.name
    path.write_bytes(reader.wrap(content))
    began = time.perf_counter()
    try:
        with _limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
        kind, error = "read", ""
    except reader.errors as caught:
        kind, error = "refused", str(caught)
    except _TooSlow:
        kind, error = "slow", f"more than {SECONDS} s"
    except BaseException as caught:
        if isinstance(caught, KeyboardInterrupt):
            raise
        kind, error = "undocumented", f"{type(caught).__name__}: {str(caught)[:200]} ({_place(caught)})"
    return Outcome(kind, time.perf_counter() - began, error)


@contextmanager
def prepared(reader: Reader) -> Iterator[Path]:
    """A temporary folder with the files that belong to a reader's input."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in reader.beside.items():
            file = Path(scratch) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (Path(scratch) / reader.name).parent.mkdir(parents=True, exist_ok=True)
        yield Path(scratch)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tests" not in Path(frame.filename).parts]
    own = [frame for frame in frames if "site-packages" not in frame.filename and "python3" not in frame.filename] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"


# Inputs

_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x5B, 0x7B)
_WORDS = tuple(
    value.to_bytes(size, order, signed=value < 0) for value in (-1, 0, 2**31 - 1) for size in (4, 8) for order in ("little", "big")
)  # lengths and counts of binary formats


def flipped(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """A file with one to four changes; `other` is another of its kind."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 16, 256))
        what = rng.randrange(8)
        if what == 0:
            changed[at : at + 1] = bytes([rng.choice(_BYTES)])
        elif what == 1 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            del changed[at : at + length]
        elif what == 3:
            changed[at:at] = changed[at : at + length]
        elif what == 4:
            del changed[at:]
        elif what == 5:
            word = rng.choice(_WORDS)
            changed[at : at + len(word)] = word
        elif what == 6:
            start = rng.randrange(len(other) + 1)
            changed[at : at + length] = other[start : start + length]
        else:
            changed[at:at] = rng.randbytes(length)
    return bytes(changed)


_HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**25, 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), "", "a", "0", "seven", "\x00", "\ud800", "\x1b[2J", "é" * 300,
    "../../x", "/etc/passwd", "nan", [], {}, [[]], [None], {"a": 1}, [0] * 7, [1e400, -1],
)  # fmt: skip


def altered(document: Any, rng: random.Random) -> Any:
    """A JSON document with one to three changes."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return rng.choice(_HOSTILE)
        parent, key = rng.choice(places)
        what = rng.randrange(10)
        if what == 0:
            del parent[key]
        elif what == 1:
            parent[key] = _nested(parent[key], rng.choice((1, 3, 200)))
        elif what == 2 and isinstance(parent, list):
            parent += [copy.deepcopy(parent[key])] * rng.choice((1, 2, 100))
        elif what == 3:
            other, place = rng.choice(places)
            parent[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else (other[place : place + 1] or [None])[0])
        elif what == 4 and isinstance(parent, dict):
            parent[str(rng.choice(_HOSTILE))] = parent[key]
        else:
            parent[key] = copy.deepcopy(rng.choice(_HOSTILE))
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or dict, index or key) of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield document, key
        yield from _places(value)


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def draw(reader: Reader, rng: random.Random) -> bytes:
    """One input for a reader."""
    first, second = rng.choice(reader.valid), rng.choice(reader.valid)
    if reader.form in ("json", "jsonl", "toml") and rng.random() < 0.002:
        return rng.choice((b"[", b'{"a":', b"a = [")) * 20_000  # deeper than any parser goes
    if reader.form in ("json", "jsonl", "toml") and rng.random() < 0.6:
        return _document(reader.form, first, rng)
    return flipped(first, second, rng)


def _document(form: Form, content: bytes, rng: random.Random) -> bytes:
    if form == "json":
        return _dumped(altered(json.loads(content), rng))
    if form == "toml":
        return _as_toml(altered(tomllib.loads(content.decode()), rng)).encode("utf-8", "surrogatepass")
    lines = [json.loads(line) for line in content.splitlines()]
    lines[rng.randrange(len(lines))] = altered(rng.choice(lines), rng)
    return b"\n".join(map(_dumped, lines)) + b"\n"


def _dumped(document: Any) -> bytes:
    try:
        return json.dumps(document).encode()
    except ValueError:  # numbers of more than 4,300 digits
        return b"[" * 100_000


def _as_toml(document: Any) -> str:
    """TOML of tables of values; what TOML has no word for is written as JSON has it, so the file is refused."""
    lines = []
    for name, table in document.items() if isinstance(document, dict) else [("table", document)]:
        lines += [f"[{json.dumps(name)}]"] if isinstance(table, dict) else [f"{json.dumps(name)} = {_toml_value(table)}"]
        lines += [f"{json.dumps(key)} = {_toml_value(value)}" for key, value in table.items()] if isinstance(table, dict) else []
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=not isinstance(value, str))


def strategies(reader: Reader) -> st.SearchStrategy[bytes]:
    """Inputs by hypothesis."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    anything = st.recursive(
        scalars, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=8), part, max_size=4)
    )
    kinds = [st.builds(lambda rng: draw(reader, rng), st.randoms(use_true_random=False)), st.binary(max_size=200)]
    if reader.form in ("json", "jsonl"):
        kinds.append(anything.map(_dumped))
    if reader.form == "text":
        kinds.append(st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
    return st.one_of(kinds)
