"""What a run's account of its attention costs: a call of the pipeline with it / the same call without.

    python benchmarks/attention_account.py [--rounds 10] [--out benchmarks/results/attention_account.json]

"first" audits its first step (a call of a new shape), "later" knows it; both are guarded throughout. The three are timed in turn
within each round, on `digits` with classifier-free guidance, pictures included; the ratio is of the medians. The pictures are
compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clock import seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.attention import proof
from genkit.pipelines import GuidedPipeline

CASES = ((1, 1), (1, 4), (1, 30), (16, 1), (16, 4), (16, 30))  # batch, steps


@contextmanager
def without() -> Iterator[None]:
    """No guard and no audit inside the block."""

    def nothing(*args: Any, **options: Any) -> Any:
        return nullcontext()

    no_lint = mock.patch.object(proof, "lint", return_value=())
    with no_lint, mock.patch.object(proof, "guarding", nothing), mock.patch.object(proof.Proof, "step", nothing):
        yield


def measure(pipe: GuidedPipeline, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Medians of the times, their ratios, and whether the pictures are the same."""

    def draw() -> Tensor:
        options = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
        return pipe("a red seven", seeds=list(range(batch)), **options).images

    def first() -> Tensor:
        pipe._audited.reports.clear()
        return draw()

    def plain() -> Tensor:
        with without():
            return draw()

    cases: dict[str, Callable[[], Tensor]] = {"plain": plain, "first": first, "later": draw}
    pictures = {name: case() for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(seconds(case))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch": batch, "steps": steps, **{f"{name}_ms": 1e3 * value for name, value in median.items()},
        "first_ratio": median["first"] / median["plain"], "later_ratio": median["later"] / median["plain"],
        "same": all(torch.equal(picture, pictures["plain"]) for picture in pictures.values()),
    }  # fmt: skip


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_account.json"))
    arguments = parser.parse_args()
    pipe = GuidedPipeline.from_pretrained("digits")
    pipe.host.set_progress_bar_config(disable=True)
    rows = [measure(pipe, batch, steps, arguments.rounds) for batch, steps in CASES]
    table = Table("batch", "steps", "without, ms", "first / without", "later / without", "same bits", box=None)
    for row in rows:
        ratios = (f"{row['first_ratio']:.3f}", f"{row['later_ratio']:.3f}")
        table.add_row(str(row["batch"]), str(row["steps"]), f"{row['plain_ms']:.1f}", *ratios, str(row["same"]))
    Console().print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "model": "digits", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
