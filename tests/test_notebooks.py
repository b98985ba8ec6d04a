"""The notebooks: they run from top to bottom and draw, and what is committed of their outputs is theirs, whole, small and clean."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from benchmarks.notebooks import LIMIT, PICTURE, WIDTH, clean, source_hash
from tests.kernels import forked

CHECKOUT = Path(__file__).parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
RESULTS = CHECKOUT / "benchmarks" / "results" / "notebooks.json"
FILE_BYTES, ALL_BYTES = 400_000, 3_000_000
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What the tests put after the cell of the settings, which has the tag "parameters".
SMALL = {
    "assembly": """
from genkit.assembly import SearchConfig
SIZE = 200
SEARCH = SearchConfig(candidates=120, rotations=24, starts=8, beam=4, rounds=1, renewed=1, fine=512, last=1024, resolution=64)
""",
    "attention": "STEPS, SEEDS, LENGTHS, SCALES = 6, [0, 1], [128, 256], [0.0, 20.0, 100.0]",
    "class_tokens": "UPDATES, STEPS, SEEDS = 3, 10, list(range(5000, 5004))",
    "classifier_guidance": "STEPS, SEEDS, SCALES, FEW = 10, [0, 1, 2], [0, 8], 4",
    "detection": "SCENES, STEPS, PROPOSALS, BUDGET = [0], 10, 2, 1000",
    "diffusion_classifier": "IMAGES, PAIRS, MORE, DRAWN = 8, 8, 20, 4",
    "discriminator_guidance": "PICTURES, COUNT, UPDATES, DRAWN = 30, 100, 10, 10",
    "distillation": "TEACHER, ROUNDS, MEAN_ROUNDS, COUNT, DIGIT_ROUNDS, PAINT_ROUNDS, SHOWN = 100, 30, 10, 16, 2, 2, 4",
    "dreamteacher": "PICTURES, STEPS, BATCH, SIZE, TRAIN, TEST, COUNTS, LABEL_STEPS = 64, 4, 16, 32, 400, 60, [40, 100], 3",
    "features": "TRAIN, TEST, TIMES, STEPS, REPEATS = 120, 60, [50, 400], 10, 3",
    "generative_classifiers": """
DIGITS, STEPS, DISCRIMINATIVE_STEPS, PAIRS, DRAWS = [2, 7], 4, 10, 6, 2
NOISE_FEATURES, SCALES, REPEATS = [0, 50, 120], [1.0, 3.0], 1
""",
}


def cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def drawings(cell: NotebookNode) -> int:
    """How many pictures a cell should show: its plots, and a contact sheet if that is its result."""
    last = [line for line in cell.source.splitlines() if line and line[0] not in " )"][-1]
    return cell.source.count("plt.show()") + last.startswith("contact_sheet(")


def pictures(cell: NotebookNode) -> list[Image.Image]:
    shown = [output.data[PICTURE] for output in cell.outputs if PICTURE in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(encoded))) for encoded in shown]


def kinds(cell: NotebookNode) -> set[str]:
    return {output.output_type for output in cell.outputs}


def test_every_system_has_one():
    guidance = {"classifier_guidance", "discriminator_guidance", "class_tokens"}
    others = {"diffusion_classifier", "generative_classifiers", "features", "detection", "dreamteacher", "distillation", "assembly"}
    assert {path.stem for path in NOTEBOOKS} == set(SMALL) >= guidance | others


@pytest.mark.slow
@each_notebook
def test_runs_and_draws_what_is_kept(path, tmp_path, monkeypatch):
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    committed = cells(nbformat.read(path, as_version=4))
    (settings,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(settings + 1, nbformat.v4.new_code_cell(SMALL[path.stem]))
    forked(NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})).execute()
    del notebook.cells[settings + 1]
    clean(notebook)
    for cell, kept in zip(cells(notebook), committed, strict=True):
        assert kinds(cell) == kinds(kept), cell.source
        for picture in pictures(cell):
            assert len(picture.convert("RGB").getcolors(2**24)) > 10, cell.source
        assert len(pictures(cell)) == drawings(cell), cell.source
    assert sum(map(drawings, committed)) >= 5


@each_notebook
def test_begins_with_an_installation_in_one_line(path):
    source = cells(nbformat.read(path, as_version=4))[0].source
    (line,) = (line for line in source.splitlines() if not line.startswith("#"))
    assert 'find_spec("genkit") or' in line
    assert "install -q ..[notebooks]" in line


@each_notebook
def test_outputs_are_of_this_code_whole_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in cells(notebook)] == list(range(1, len(cells(notebook)) + 1))
    assert json.loads(RESULTS.read_text())["rows"][path.stem]["code"] == source_hash(notebook), (
        f"The code of {path.name} has changed since its outputs were made: python benchmarks/notebooks.py {path.stem}"
    )
    for cell in cells(notebook):
        assert len(pictures(cell)) == drawings(cell), cell.source
        assert all(picture.width <= WIDTH for picture in pictures(cell)), cell.source
    assert path.stat().st_size <= FILE_BYTES


@each_notebook
def test_names_no_machine_and_keeps_nothing_volatile(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        for output in cell.get("outputs", []):
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", cell.source
            assert not any("widget" in kind for kind in output.get("data", {})), cell.source
            output.get("data", {}).pop(PICTURE, None)
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|var|Users|mnt|opt)/|[A-Z]:\\\\", nbformat.writes(notebook))


def test_all_together_are_small_and_fast():
    assert sum(path.stat().st_size for path in NOTEBOOKS) <= ALL_BYTES
    document = json.loads(RESULTS.read_text())
    assert set(document["rows"]) == {path.stem for path in NOTEBOOKS}
    assert document["together"]["seconds_of_idle_cores"] <= LIMIT
