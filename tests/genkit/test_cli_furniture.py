"""`genkit make-furniture` and `genkit assemble-eval`: what is written is read again; rows are kept; clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from genkit.assembly import PartSet, SearchConfig, chamfer
from genkit.cli.app import app
from tests.genkit.test_assembly_search import QUICK, chair

trimesh = pytest.importorskip("trimesh")

from genkit.data.meshes import read_parts  # noqa: E402
from genkit.data.objects import centred, find_objects, reference_cloud  # noqa: E402


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("format", ["obj", "ply", "stl", "glb", "npz"])
def test_furniture_is_written_and_read_again(tmp_path: Path, format: str) -> None:
    result = run("make-furniture", "--out", tmp_path, "--category", "table", "--count", 2, "--format", format, "--json")
    assert result.exit_code == 0, result.output
    objects = json.loads(result.stdout)["objects"]
    assert objects == json.loads((tmp_path / "furniture.json").read_text())["objects"]
    assert [str(path.relative_to(tmp_path)) for path in find_objects(tmp_path)] == [one["path"] for one in objects]
    for one in objects:
        parts = read_parts(tmp_path / one["path"])
        assert sorted(parts.names) == sorted(one["parts"])
        assert all(len(contact["parts"]) == 2 for contact in one["contacts"])
        assert parts.poses is not None


def test_furniture_is_the_same_for_a_seed(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 1)):
        assert run("make-furniture", "-o", tmp_path / folder, "--category", "lamp", "--count", 2, "--seed", seed).exit_code == 0
    files = [sorted((tmp_path / folder / "lamp-test-1").iterdir()) for folder in "ab"]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make-furniture", "--category", "chiar"), "Did you mean 'chair'"),
        (("make-furniture", "--split", "tset"), "Unknown split"),
        (("make-furniture", "--format", "fbx"), "Unknown format"),
    ],
)
def test_wrong_names_are_told(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert (result.exit_code, message in result.stderr) == (2, True)


def test_a_reference_is_a_sample_of_the_whole_in_its_lengths() -> None:
    parts = PartSet.from_meshes(chair(), truth=True)
    cloud = reference_cloud(parts, 2000)
    whole = torch.from_numpy(trimesh.sample.sample_surface(trimesh.util.concatenate(chair()), 2000, seed=3)[0])
    assert chamfer(cloud, whole) < 1e-3
    assert not torch.equal(cloud, reference_cloud(parts, 2000, seed=1))
    clouds = PartSet.from_clouds(
        [trimesh.sample.sample_surface(mesh, 500, seed=i)[0] for i, mesh in enumerate(chair())], truth=True
    )
    assert chamfer(reference_cloud(clouds, 2000), whole) < 1e-3
    moved = centred(parts)
    assert reference_cloud(moved, 2000).mean(0).abs().max() < 0.02
    with pytest.raises(ValueError, match="not known"):
        reference_cloud(PartSet.from_meshes(chair()))


def test_objects_are_evaluated_and_rows_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SearchConfig.__init__, "__kwdefaults__", vars(QUICK))
    assert SearchConfig() == QUICK
    data, out = tmp_path / "data", tmp_path / "rows.json"
    assert run("make-furniture", "-o", data, "--category", "lamp", "--count", 1).exit_code == 0
    (data / "broken").mkdir()
    for name in "ab":
        (data / "broken" / f"{name}.obj").write_text("")
    arguments = ("assemble-eval", data, "--points", 2048, "--out", out, "--json")
    result = run(*arguments)
    assert result.exit_code == 3, result.output
    document = json.loads(result.stdout)
    assert [row["object"] for row in document["rows"]] == ["lamp-test-0"]
    assert list(document["failed"]) == ["broken"]
    assert document["rows"][0]["part_accuracy"] >= 0.5
    assert document["summary"]["objects"] == 1
    assert set(document["summary"]) >= {"part_accuracy", "shape_chamfer", "first_is_best", "seconds_median"}
    assert "exists" in run(*arguments).stderr
    assert "other settings (points)" in run(*arguments[:2], "--points", 4096, "--out", out, "--resume").stderr
    again = json.loads(run(*arguments, "--resume").stdout)
    assert again["rows"] == document["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no folder"),
        (("furniture:sofa",), "Unknown category"),
        (("furniture:chair", "--protocol", "strikt"), "Did you mean 'strict'"),
        (("furniture:chair", "--model", "nothing"), "Unknown model"),
    ],
)
def test_what_cannot_be_evaluated_is_told(arguments: tuple[str, ...], message: str) -> None:
    result = run("assemble-eval", *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
