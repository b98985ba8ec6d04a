"""`genkit attention bench`: what attention costs here, fused and dense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import Debug, Device, Json, Quiet, check_device, check_dtype, command, option

if TYPE_CHECKING:
    from rich.console import Group

MODELS = ("sd15", "sdxl", "sd3", "flux")
_WHAT, _MACHINE = "What to measure", "Machine"


def bench(
    models: Annotated[str, option(_WHAT, "Whose shapes: some of sd15, sdxl, sd3, flux.")] = ",".join(MODELS),
    batch: Annotated[int, option(_WHAT, "Samples.", min=1, max=1024)] = 1,
    rounds: Annotated[int, option(_WHAT, "Timings of each; the median counts.", min=1, max=1000)] = 5,
    gradient: Annotated[bool, option(_WHAT, "Also with gradients.")] = True,
    full: Annotated[bool, option(_WHAT, "Full size on a CPU too, where images are 1/16 of it otherwise.", "--full")] = False,
    out: Annotated[Path | None, option(_WHAT, "Write the figures to this JSON file.")] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None, option(_MACHINE, "float32, float16 or bfloat16.", show_default="float16; on a CPU float32")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time attention at the shapes of Stable Diffusion 1.5, SDXL, SD3 and Flux.

    Compares the dense matrix with torch's fused kernels, xformers, compiled flex attention, statistics by algebra on fused calls,
    and this project's Triton kernels. What does not run here has the reason in its row. Speeds count what must be computed and
    moved, so a way that does more shows less.

    Examples:

        [bold]genkit attention bench --models sd15 --rounds 3[/bold]

        [bold]genkit attention bench --dtype bfloat16 --out bench.json[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        check_device(device)
        names = _models(models)
        if dtype is not None:
            check_dtype(dtype)
        if out is not None and out.is_dir():
            raise ValueError(f"--out {str(out)!r} is a folder. Name a JSON file.")
        document = _run(names, batch, rounds, gradient, full, device, dtype)
        if out is not None:
            import json

            from genkit.files import write_atomic

            write_atomic(out, (json.dumps(document, indent=2) + "\n").encode())
        output.result(document, _shown(document))


def _models(text: str) -> list[str]:
    """The models of the option.

    Raises:
        ValueError: an unknown one, or none.
    """
    from genkit.errors import unknown

    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--models {text!r} names no model. Known: {', '.join(MODELS)}.")
    for name in names:
        if name not in MODELS:
            raise unknown("model", name, MODELS)
    return list(dict.fromkeys(names))


def _run(names: list[str], batch: int, rounds: int, gradient: bool, full: bool, device: str, dtype: str | None) -> dict[str, Any]:
    import torch

    from genkit.attention import bench as benchmark
    from genkit.cli.common import resolve_device
    from genkit.console import progress

    device = resolve_device(device)
    on_gpu = device.startswith("cuda")
    dtype = dtype or ("float16" if on_gpu else "float32")
    side = 1 if on_gpu or full else 4
    shapes = [shape.smaller(side) for name in names for shape in benchmark.SHAPES[name]]
    with progress() as bar:
        task = bar.add_task("attention", total=benchmark.count_tasks(shapes, gradient))
        rows = benchmark.run(
            shapes, batch=batch, dtype=getattr(torch, dtype), device=device, rounds=rounds, gradients=gradient,
            progress=lambda: bar.advance(task),
        )  # fmt: skip
    return {"machine": benchmark.machine(device), "dtype": dtype, "image_side": f"1/{side}", "rounds": rounds, "rows": rows}


def _shown(document: dict[str, Any]) -> Group:
    """A table for each layer, and below them why some ways were not run."""
    from rich.console import Group
    from rich.table import Table

    machine = document["machine"]
    on = machine["device"] if machine["gpu"] == "yes" else f"{machine['device']} ({machine['gpu']})"
    size = "" if document["image_side"] == "1/1" else f"; images of {document['image_side']} of the side"
    parts: list[Any] = [f"{on}, {document['dtype']}{size}"]
    reasons: dict[tuple[str, str], None] = {}
    layer, task = "", ""
    for row in document["rows"]:
        here = f"{row['model']}, {row['layer']}: B, H, L, S, D = {row['B']}, {row['H']}, {row['L']}, {row['S']}, {row['D']}"
        if here != layer:
            layer, task = here, ""
            table = Table("", "way", "ms", "dense / this", "TFLOP/s", "GB/s", "MB", title=here, title_justify="left", box=None)
            parts += ["", table]
        if "reason" in row:
            reasons[row["way"], row["reason"]] = None
            continue
        ratio = "" if row["dense_over_this"] is None else f"{row['dense_over_this']:.2f}"
        numbers = (f"{row['ms']:.2f}", ratio, f"{row['tflops']:.3f}", f"{row['gbs']:.2f}", f"{row['mb']:.1f}")
        table.add_row(row["task"] if row["task"] != task else "", row["way"], *numbers)
        task = row["task"]
    ways: dict[str, list[str]] = {}
    for way, reason in reasons:
        ways.setdefault(reason, []).append(way)
    parts += ["", *(f"Not run: {', '.join(names)}. {reason.rstrip('.')}." for reason, names in ways.items())]
    return Group(*parts)
