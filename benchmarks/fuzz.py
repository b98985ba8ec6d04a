"""Every reader of genkit on damaged and hostile inputs: what is raised, how much memory and time it takes.

    python benchmarks/fuzz.py [--count 100000] [--readers NAME ...] [--resume] [--out benchmarks/results/fuzz.json] [--keep DIR]

Each reader runs in a process of its own, whose peak memory (resident, with all it imports) and whose exit are told. A tenth of its
inputs is made by hypothesis, the rest by changes of valid files from a fixed seed; `tests/fuzz.py` says how, `tests/readers.py` has
the readers. An error that the reader's docstring does not name, a crash, or an input that takes more than 10 s counts as
undocumented and makes the exit code 1; `--keep` writes such inputs to a folder. A reader's row is written as soon as it is there,
and `--resume` measures only those that have none yet with as many inputs and without a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import logging
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARE = 10  # one input of so many is made by hypothesis
PART = 40  # inputs that hypothesis makes at a time


def measure(name: str, count: int, keep: Path | None) -> dict[str, Any]:
    """What came of `count` inputs of one reader, in this process."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fuzz import attempt, draw, prepared, strategies
    from tests.readers import READERS

    logging.disable(logging.CRITICAL)
    kinds: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    slowest = 0.0
    reader = READERS[name]()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with prepared(reader) as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):

        def run(content: bytes) -> None:
            nonlocal slowest
            outcome = attempt(reader, content, folder)
            kinds[outcome.kind] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.kind in ("undocumented", "slow"):
                errors[outcome.error] += 1
                if keep is not None and errors[outcome.error] == 1:
                    slug = f"{name}-{hashlib.sha256(outcome.error.encode()).hexdigest()[:8]}".replace(" ", "-").replace("/", "-")
                    (keep / slug).write_bytes(reader.wrap(content))

        began = time.perf_counter()
        for content in reader.valid:
            run(content)
            if kinds["read"] != sum(kinds.values()):
                raise RuntimeError(f"A valid input of {name!r} is not read.")
        # In parts, since hypothesis keeps what it draws: 6 GB of checkpoints of 1.4 MB, with a reader that reads nothing.
        for start in range(0, max(1, count // SHARE), PART):
            drawn = settings(
                max_examples=min(PART, max(1, count // SHARE) - start), deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(strategies(reader))(run))  # fmt: skip
            seed(start)(drawn)()
            gc.collect()
        rng = random.Random(0)
        while kinds.total() < count:
            run(draw(reader, rng))
    return {
        "inputs": kinds.total(), "read": kinds["read"], "refused": kinds["refused"],
        "undocumented": kinds["undocumented"] + kinds["slow"],
        "errors": dict(errors.most_common(20)), "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "imports_mb": base / 1024, "seconds": time.perf_counter() - began, "slowest_seconds": slowest,
    }  # fmt: skip


def in_process(name: str, count: int, keep: Path | None) -> dict[str, Any]:
    """`measure` in a process of its own, so that a crash is seen and memory is one reader's."""
    line = [sys.executable, __file__, "--only", name, "--count", str(count), *(["--keep", str(keep)] if keep else [])]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        told = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return {"inputs": 0, "undocumented": 1, "errors": {f"exit code {done.returncode}: {told[0]}": 1}}


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("reader", "inputs", "read", "undocumented", "peak MB (imports)", "seconds", "slowest", box=None)
    for name, row in results.items():
        memory = f"{row.get('peak_mb', 0):.0f} ({row.get('imports_mb', 0):.0f})"
        seconds, slowest = f"{row.get('seconds', 0):.0f}", f"{row.get('slowest_seconds', 0):.2f}"
        table.add_row(name, f"{row['inputs']:,}", f"{row.get('read', 0):,}", f"{row['undocumented']:,}", memory, seconds, slowest)
    console = Console(width=130)
    console.print(table)
    for name, row in results.items():
        for error, times in row["errors"].items():
            console.print(f"{name}: {error} ({times} times)", markup=False)


def write(out: Path, count: int, results: dict[str, dict[str, Any]]) -> None:
    """The JSON, whole or not at all: it is written after each reader."""
    from genkit.files import write_atomic

    machine = {"platform": platform.platform(), "python": platform.python_version()}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, (json.dumps({"machine": machine, "count": count, "readers": results}, indent=2) + "\n").encode())


def main() -> None:
    """Measure, print the table, write the JSON."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each reader")
    parser.add_argument("--readers", nargs="*", help="some of them; all by default")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--keep", type=Path, help="folder for inputs that raise an undocumented error")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    if arguments.only is not None:
        print(json.dumps(measure(arguments.only, arguments.count, arguments.keep)))
        return
    from tests.readers import READERS

    wanted = arguments.readers or list(READERS)
    results: dict[str, dict[str, Any]] = {}
    if arguments.resume and arguments.out.exists():
        before = json.loads(arguments.out.read_text())["readers"]
        results = {
            name: row for name, row in before.items()
            if name in READERS and row["inputs"] >= arguments.count and not row["undocumented"]
        }  # fmt: skip
    for name in wanted:
        if name not in results:
            results[name] = in_process(name, arguments.count, arguments.keep)
            print(f"{name}: {results[name]['undocumented']} undocumented", file=sys.stderr, flush=True)
            write(arguments.out, arguments.count, {name: results[name] for name in READERS if name in results})
    report(results)
    if any(row["undocumented"] for row in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
