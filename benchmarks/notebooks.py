"""The notebooks, run from top to bottom: their time, and the outputs that are kept in them.

    python benchmarks/notebooks.py [NAME ...] [--jobs 2] [--threads 1] [--folder DIR] [--out benchmarks/results/notebooks.json]

Each runs in a kernel of its own, in an empty folder, with no setting changed. `--jobs` run at a time, each with `--threads`.
Its outputs are then written back without what differs from run to run (times of execution, progress bars, widgets) and with small
pictures: at most `WIDTH` pixels wide, in `COLORS` colours. `seconds` are those of a clock on the wall, from the start of the kernel
to its end, `cpu_seconds` those of the kernel's threads. The clock depends on what else the machine does, and no notebook waits for
anything, so what is held to `LIMIT` is what `CORES` cores take that have nothing else to do: the sum of `cpu_seconds` / `CORES`.
The exit code is 1 if it is more, or if a notebook fails. With names the others keep the rows that they have.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
import torch
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from rich.console import Console
from rich.table import Table

from genkit.files import write_atomic

CORES, LIMIT = 2, 12 * 60  # seconds, all together
WIDTH = 1000  # of a picture, in pixels
COLORS = 256  # of a palette
PICTURE = "image/png"
SUMMED = ("cpu_seconds", "pictures", "bytes")
SHOWN = {"seconds": "seconds", "CPU seconds": "cpu_seconds", "pictures": "pictures", "kB": "bytes"}


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
    # Rare colours, such as the ends of a colour bar, are kept as well as frequent ones.
    palette = image.quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    palette.save(png, "PNG", optimize=True)
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


def run(path: Path) -> dict[str, Any]:
    """Execute a notebook, write its outputs, return its row."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("__import__('time').process_time()"))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    seconds, used = time.perf_counter() - began, float(notebook.cells.pop().outputs[0].data["text/plain"])
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
    """The sums of all rows, and what idle cores take."""
    sums = {key: round(sum(row[key] for row in rows.values()), 1) for key in SUMMED}
    return {"seconds_of_idle_cores": round(sums["cpu_seconds"] / CORES, 1), **sums}


def write(arguments: argparse.Namespace, rows: dict[str, Any]) -> None:
    """The JSON."""
    machine = {"device": "CPU", "cores": os.cpu_count(), "jobs": arguments.jobs, "threads": arguments.threads}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    document = {"machine": {**machine, **versions}, "limit_seconds": LIMIT, "together": together(rows), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())


def main() -> int:
    """Run the notebooks, print the table, write them and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all of them")
    parser.add_argument("--jobs", type=int, default=CORES, help="notebooks at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each")
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
    failed, names = [], arguments.names or list(paths)
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run, paths[name]): name for name in names}
        for job in concurrent.futures.as_completed(jobs):
            name = jobs[job]
            try:
                rows[name] = job.result()
            except Exception as error:
                print(f"{name}: {error}", file=sys.stderr)
                failed.append(name)
                continue
            print(name, rows[name], flush=True)
            write(arguments, {name: rows[name] for name in paths if name in rows})

    table = Table("notebook", *SHOWN, box=None)
    summed = together(rows)
    for name, row in {**rows, "together": {"seconds": summed["seconds_of_idle_cores"], **summed}}.items():
        table.add_row(name, *(f"{row[key] / (1000 if key == 'bytes' else 1):.0f}" for key in SHOWN.values()))
    Console().print(table)
    return int(bool(failed) or summed["seconds_of_idle_cores"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
