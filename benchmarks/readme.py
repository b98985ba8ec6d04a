"""The README's examples, typed in order in an empty folder, as a new user would: does each work, and how long does it take?

    python benchmarks/readme.py [--install] [--folder DIR] [--out benchmarks/results/readme.json]

With `--install` the checkout is cloned and the first command is run word for word, which makes the environment; without, the
examples run in this one. Then comes each line of a shell block, and each Python block as a process of its own. Blocks below a
comment `<!-- not run: why -->` are passed over. What a step prints is shown if it fails; the exit code is 1 if one fails or takes
more than `LIMIT` seconds. Installing is not limited: it is as fast as the network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from clock import machine
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genkit.files import write_atomic

ROOT = Path(__file__).parent.parent
LIMIT = 120  # seconds
_BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<kind>sh|python)\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)


class Step(NamedTuple):
    """What is typed, below which heading."""

    heading: str
    kind: str
    text: str

    @property
    def name(self) -> str:
        """A short name."""
        first = next(line for line in self.text.splitlines() if not line.startswith(("from ", "import ")) and line)
        return f"{self.heading}: {self.text if self.kind == 'sh' else first}"


def steps(readme: str) -> list[Step]:
    """The examples of a README that are run, without those of its start."""
    found = []
    for section in re.split(r"^## ", readme, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        for block in _BLOCK.finditer(section):
            if heading == "Start" or (block["note"] or "").startswith("not run"):
                continue
            lines = block["body"].replace("\\\n", " ").splitlines() if block["kind"] == "sh" else [block["body"]]
            found += [Step(heading, block["kind"], line) for line in lines]
    return found


def first_command(readme: str) -> str:
    """The README's first command."""
    return next(block["body"].strip() for block in _BLOCK.finditer(readme))


def run(step: Step, folder: Path, scripts: Path) -> dict[str, Any]:
    """Type a step in a folder, in an environment whose programs are in `scripts`."""
    line = ["bash", "-c", step.text] if step.kind == "sh" else ["python", "-c", step.text]
    # As in the activated environment.
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    began = time.perf_counter()
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    seconds = round(time.perf_counter() - began, 1)
    if done.returncode:
        print(f"{step.name}\n{done.stdout}{done.stderr}", file=sys.stderr)
    return {"step": step.name, "seconds": seconds, "exit_code": done.returncode}


def install(folder: Path, readme: str) -> tuple[dict[str, Any], Path, Path]:
    """Clone the checkout, and run the first command in it: its row, the clone, the programs of its environment."""
    clone = folder / "genkit"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    row = run(Step("Start", "sh", first_command(readme)), clone, Path(sys.base_prefix) / "bin")
    return row, clone, clone / ".venv" / "bin"


def main() -> int:
    """Run the examples, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="begin with the first command, in a clone")
    parser.add_argument("--folder", type=Path, help="an empty folder to work in, which is kept")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/readme.json"))
    arguments = parser.parse_args()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        scripts = Path(sys.executable).parent
        if arguments.install:
            row, folder, scripts = install(folder, readme)
            rows.append({**row, "limit": None})
        for step in steps(readme):
            rows.append({**run(step, folder, scripts), "limit": LIMIT})
            print(json.dumps(rows[-1]), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps({"machine": machine("cpu"), "rows": rows}, indent=2) + "\n").encode())
    table = Table("step", "seconds", "", box=None)
    failed = False
    for row in rows:
        slow = row["limit"] is not None and row["seconds"] > row["limit"]
        failed |= bool(row["exit_code"]) or slow
        table.add_row(Text(row["step"]), f"{row['seconds']:.1f}", "failed" if row["exit_code"] else "slow" if slow else "")
    Console(width=160).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
