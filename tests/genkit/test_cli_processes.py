"""`genkit sample` as a process: interrupted, and as several processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from tests.processes import stopped, torchrun


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_keeps_what_is_finished(tiny_folder: Path, tmp_path: Path) -> None:
    line = [
        "sample",
        "a seven",
        "--model",
        str(tiny_folder),
        "--seeds",
        "0-999",
        "--steps",
        "20",
        "--batch",
        "1",
        "--out",
        str(tmp_path),
    ]
    code, stdout, stderr = stopped([*line, "--json"], lambda: len(list(tmp_path.glob("*.json"))) >= 2)
    assert code == 130, stderr
    assert "Repeat with --resume to finish" in stderr
    document = json.loads(stdout)
    assert document["interrupted"]
    assert 2 <= len(document["images"]) < 1000
    for entry in document["images"]:
        Image.open(entry["file"]).load()
    assert not list(tmp_path.glob(".*"))


def test_two_processes_make_what_one_makes(tiny_folder: Path, tmp_path: Path) -> None:
    line = ["sample", "a red seven", "--model", str(tiny_folder), "--seeds", "0-4", "--steps", "3", "--out"]
    code, stdout, stderr = torchrun([*line, str(tmp_path / "two"), "--json"])
    assert code == 0, stderr
    assert len(json.loads(stdout)["images"]) == 5
    assert CliRunner().invoke(app, [*line, str(tmp_path / "one")]).exit_code == 0
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == names
    for name in names:
        if name.endswith(".png"):
            one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
            assert np.abs(one - two).max() <= 1
