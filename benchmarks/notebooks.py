"""The notebooks, run from top to bottom: their time, and the outputs that are kept in them.

    python benchmarks/notebooks.py [NAME ...] [--threads 2] [--folder notebooks] [--out benchmarks/results/notebooks.json]

Each runs in a kernel of its own, in an empty folder, as it is: no setting is changed. Its outputs are then written back without
what differs from run to run (times of execution, progress bars, widgets) and with small pictures: at most `WIDTH` pixels wide, in
`COLORS` colours. `seconds` are those of a clock on the wall, from the start of the kernel to its end, `cpu_seconds` those of all
its threads: with one thread an upper bound of what a machine takes that has nothing else to do, since no notebook waits.
The exit code is 1 if a notebook fails, or if all of them together take longer than `LIMIT` by both. With names the others keep
the rows that they have.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image
from rich.console import Console
from rich.table import Table

from genkit.files import write_atomic

LIMIT = 12 * 60  # seconds, all together on two cores
WIDTH = 1000  # of a picture, in pixels
COLORS = 128
PICTURE = "image/png"
SUMMED = ("seconds", "cpu_seconds", "pictures", "bytes")


def source_hash(notebook: NotebookNode) -> str:
    """A hash of the code alone: outputs belong to the code that made them."""
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def small(picture: bytes) -> bytes:
    """A picture as a small PNG: narrow, on white, with a palette."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA")).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    png = io.BytesIO()
    image.quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
    return png.getvalue()


def kept(output: NotebookNode) -> NotebookNode | None:
    """An output as it is committed, or None."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if any("widget" in kind for kind in output.data):
        return None
    if PICTURE in output.data:  # pillow's pictures come as JPEG too
        picture = small(base64.b64decode(output.data[PICTURE]))
        output.data = {PICTURE: base64.b64encode(picture).decode(), "text/plain": output.data["text/plain"]}
    output.metadata = {}
    return output


def clean(notebook: NotebookNode) -> list[str]:
    """Leave in the cells what is committed. Returns what was said on stderr, which is not; without progress bars."""
    said = []
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            texts = [output.text for output in cell.outputs if output.get("name") == "stderr"]
            said += [text for text in texts if "%|" not in text and text.strip("\x1b[A\r\n ")]
            cell.outputs = [output for output in map(kept, cell.outputs) if output is not None]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return said


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(path: Path) -> dict[str, Any]:
    """Execute a notebook, write its outputs, return its row."""
    notebook = nbformat.read(path, as_version=4)
    used, began = cpu_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    seconds, used = time.perf_counter() - began, cpu_seconds() - used
    for text in clean(notebook):
        print(f"{path.name}, on stderr: {text}", file=sys.stderr)
    written = nbformat.writes(notebook).encode() + b"\n"
    write_atomic(path, written)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum(PICTURE in output.get("data", {}) for output in outputs)
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "pictures": pictures,
        "bytes": len(written),
        "code": source_hash(notebook),
    }


def together(rows: dict[str, Any]) -> dict[str, float]:
    return {key: round(sum(row[key] for row in rows.values()), 1) for key in SUMMED}


def main() -> int:
    """Run the notebooks, print the table, write them and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("notebooks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/notebooks.json"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the kernels
    os.environ.pop("MPLBACKEND", None)
    paths = {path.stem: path for path in sorted(arguments.folder.glob("*.ipynb"))}
    unknown = set(arguments.names) - set(paths)
    if unknown:
        parser.error(f"there is no notebook {', '.join(sorted(unknown))} in {arguments.folder}: {', '.join(paths)}")

    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    failed = []
    for name in arguments.names or paths:
        try:
            rows[name] = run(paths[name])
        except CellExecutionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
            continue
        print(name, rows[name], flush=True)
        document = {
            "machine": {
                "device": "CPU",
                "cores": os.cpu_count(),
                "threads": arguments.threads,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "limit_seconds": LIMIT,
            "together": together(rows),
            "rows": {name: rows[name] for name in paths if name in rows},
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())

    table = Table("notebook", "seconds", "CPU seconds", "pictures", "kB", box=None)
    for name, row in {**rows, "together": together(rows)}.items():
        table.add_row(name, *(f"{row[key] / (1000 if key == 'bytes' else 1):.0f}" for key in SUMMED))
    Console().print(table)
    return int(bool(failed) or min(together(rows)["seconds"], together(rows)["cpu_seconds"]) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
