"""Attention statistics by algebra on fused calls, against the dense matrix: time and peak memory.

    python benchmarks/attention_statistics.py [--rounds 15] [--batches 1,4] [--out benchmarks/results/attention_statistics.json]

L = S = 1024, D = 64, 8 heads, float32: the map of 8 keys, averaged over heads, and the entropy of each row; with attention's output
or without, and with the gradient of a loss on all of it. The dense computation is the ordinary one, in the faster of two ways of
taking the entropy. All are timed in turn within each round, so that a change of the machine's speed hits all alike; CPU time on a
CPU, medians. Memory is the most that a call allocates at any time, results included. On a CUDA device the same function runs
Triton's kernel, which no GPU has run yet.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.attention import attend_probe
from genkit.files import write_atomic
from genkit.measuring import added_bytes, seconds

LENGTH, WIDTH, HEADS = 1024, 64, 8
KEYS = list(range(3, 11))
SCALE = WIDTH**-0.5


def from_probabilities(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """(output, map, entropy): softmax, then p log p."""
    p = torch.softmax(q @ k.transpose(-1, -2) * SCALE, -1)
    return None if v is None else p @ v, p[..., KEYS].mean(1), -torch.special.xlogy(p, p).sum(-1)


def from_logarithms(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """The same by log-softmax, which spares p its logarithm."""
    log_p = torch.log_softmax(q @ k.transpose(-1, -2) * SCALE, -1)
    p = log_p.exp()
    return None if v is None else p @ v, p[..., KEYS].mean(1), -(p * log_p).sum(-1)


def by_algebra(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    probe = attend_probe(q, k, v, KEYS)
    assert probe.entropy is not None
    assert probe.map is not None
    return probe.out, probe.map, probe.entropy


WAYS = {"dense, softmax": from_probabilities, "dense, log-softmax": from_logarithms, "fused": by_algebra}


def tasks(batch: int, device: torch.device) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed, by task and way."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, HEADS, LENGTH, WIDTH, generator=generator).to(device) for _ in range(3))

    def with_gradient(way: Callable[..., Any]) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(sum(x.square().mean() for x in way(*leaves)), leaves)

    return {
        "map + entropy": {name: lambda way=way: way(q, k, None) for name, way in WAYS.items()},
        "output + map + entropy": {name: lambda way=way: way(q, k, v) for name, way in WAYS.items()},
        "output + map + entropy, gradient": {name: lambda way=way: with_gradient(way) for name, way in WAYS.items()},
    }


def largest_error(batch: int, device: torch.device) -> float:
    """Of the fused float32 results, against the dense ones in float64."""
    q, k, v = (torch.randn(batch, HEADS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    exact = from_logarithms(*(x.double() for x in (q, k, v)))
    return max(
        float((x - y).abs().max()) for x, y in zip(by_algebra(q, k, v), exact, strict=True) if x is not None and y is not None
    )


def measure(batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds and bytes of each way of each task, and ratios to the better dense one."""
    cases = tasks(batch, device)
    rows: dict[str, Any] = {}
    for task, ways in cases.items():
        for way in ways.values():
            way()
        rows[task] = {name: {"bytes": added_bytes(way)} for name, way in ways.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(seconds(way))
        for name, values in times.items():
            rows[task][name]["ms"] = 1e3 * statistics.median(values)
        dense = [row for name, row in rows[task].items() if name != "fused"]
        for measure in ("ms", "bytes"):
            rows[task][f"dense / fused, {measure}"] = min(row[measure] for row in dense) / rows[task]["fused"][measure]
    return {"rows": rows, "largest_error": largest_error(1, device)}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_statistics.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {batch: measure(int(batch), arguments.rounds, device) for batch in arguments.batches.split(",")}
    table = Table("batch", "", "dense ms", "fused ms", "dense / fused", "dense MB", "fused MB", "dense / fused", box=None)
    for batch, result in results.items():
        for task, row in result["rows"].items():
            dense = [value for name, value in row.items() if name.startswith("dense,")]
            cells = []
            for unit, factor in (("ms", 1.0), ("bytes", 1e-6)):
                pair = min(value[unit] for value in dense), row["fused"][unit]
                cells += [f"{factor * value:.1f}" for value in pair] + [f"{row[f'dense / fused, {unit}']:.2f}"]
            table.add_row(batch, task, *cells)
    Console(width=120).print(table)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    document = {
        "machine": machine,
        "shape": {"L": LENGTH, "S": LENGTH, "D": WIDTH, "H": HEADS, "keys": len(KEYS)},
        "batches": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
