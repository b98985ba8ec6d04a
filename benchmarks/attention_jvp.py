"""Attention's forward derivative by fused calls, against `torch.func.jvp` of dense attention: time and peak memory.

    python benchmarks/attention_jvp.py [--rounds 11] [--out benchmarks/results/attention_jvp.json]

D = 64, 8 heads, batch 1, float32: output and tangent. Both are timed in turn within each round; CPU time on a CPU, medians.
Memory is the most that a call allocates at any time, results included. A third way, dense over blocks of 128 rows, shows what
fused calls cost on a CPU: the identity behind them works at twice the head dimension. On a CUDA device the fused way is Triton's
kernel, which no GPU has run yet.
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

from genkit.attention.jvp import attend_jvp
from genkit.files import write_atomic
from genkit.measuring import added_bytes, seconds

WIDTH, HEADS, ROWS = 64, 8, 128
SHAPES = {"self-attention": (1024, 1024), "long": (2048, 2048), "cross-attention": (4096, 77)}  # L, S


def dense(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention's derivative as torch takes it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * WIDTH**-0.5, -1) @ v

    return torch.func.jvp(attend, inputs[:3], inputs[3:])


def in_blocks(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The formula itself, dense in blocks of rows."""
    q, k, v, tq, tk, tv = inputs
    parts = []
    for at in range(0, q.shape[2], ROWS):
        rows, t_rows = (x[:, :, at : at + ROWS] * WIDTH**-0.5 for x in (q, tq))
        p = torch.softmax(rows @ k.transpose(-1, -2), -1)
        pts = p * (t_rows @ k.transpose(-1, -2) + rows @ tk.transpose(-1, -2))
        out = p @ v
        parts.append((out, p @ tv + pts @ v - pts.sum(-1, keepdim=True) * out))
    out, t_out = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return out, t_out


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"dense": dense, "in blocks": in_blocks, "fused": attend_jvp}


def measure(length: int, count: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds and bytes of each way, ratios to the dense one, and the fused one's largest error."""
    generator = torch.Generator().manual_seed(0)
    sizes = (length, count, count) * 2
    inputs = [torch.randn(1, HEADS, size, WIDTH, generator=generator).to(device) for size in sizes]
    calls = {name: lambda way=way: way(*inputs) for name, way in WAYS.items()}
    exact = in_blocks(*(x.double() for x in inputs))
    error = max(float((a - b).abs().max()) for a, b in zip(calls["fused"](), exact, strict=True))
    row: dict[str, Any] = {name: {"bytes": added_bytes(call)} for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    for name, values in times.items():
        row[name]["ms"] = 1e3 * statistics.median(values)
    ratios = {f"dense / fused, {unit}": row["dense"][unit] / row["fused"][unit] for unit in ("ms", "bytes")}
    return {**row, **ratios, "largest_error": error}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention_jvp.json"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {name: measure(*shape, arguments.rounds, device) for name, shape in SHAPES.items()}
    table = Table("", "L x S", "dense ms", "in blocks", "fused", "dense MB", "in blocks", "fused", "error", box=None)
    for name, row in results.items():
        cells = [f"{factor * row[way][unit]:.1f}" for unit, factor in (("ms", 1.0), ("bytes", 1e-6)) for way in WAYS]
        table.add_row(name, "{} x {}".format(*SHAPES[name]), *cells, f"{row['largest_error']:.1e}")
    Console(width=120).print(table)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device_name, "torch": torch.__version__, "python": platform.python_version()}
    document = {"machine": machine, "D": WIDTH, "H": HEADS, "shapes": SHAPES, "results": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
