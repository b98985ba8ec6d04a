"""`genkit assemble`: what it writes, poses that are kept, other units, and one clear error for each kind of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit.assembly import PartSet, SearchConfig, pose_matrix
from genkit.assembly.units import ratio_near
from genkit.cli.app import app
from genkit.pipelines import PartAssemblyPipeline
from tests.genkit.test_assembly_search import QUICK, chair, reposed
from tests.genkit.test_point_transformer import tiny

trimesh = pytest.importorskip("trimesh")

from genkit.zoo.training import furniture  # noqa: E402

OUTPUTS = {"poses.json", "assembled.glb", "assembled.ply", "turntable.png", "viewer.html"}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["assemble", *(str(a) for a in arguments)])


def write(folder: Path, meshes: list[Any]) -> Path:
    folder.mkdir()
    for i, mesh in enumerate(meshes):
        mesh.export(folder / f"{i}.ply")
    return folder


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("scan") / "scan.npy"
    np.save(file, trimesh.sample.sample_surface(trimesh.util.concatenate(chair()), 4096, seed=7)[0])
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained network of chairs and tables."""
    folder = tmp_path_factory.mktemp("model")
    PartAssemblyPipeline(tiny(), furniture.point_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SearchConfig.__init__, "__kwdefaults__", vars(QUICK))


def placed(folder: Path, out: Path) -> list[np.ndarray]:
    """Bounds of the meshes after the motions of poses.json."""
    parts = json.loads((out / "poses.json").read_text())["parts"]
    return [trimesh.load(folder / f"{p['name']}.ply").apply_transform(np.array(p["matrix"])).bounds for p in parts]


def test_a_chair_is_assembled_and_written(tmp_path: Path, scan: Path) -> None:
    folder, out = write(tmp_path / "chair", chair()), tmp_path / "out"
    result = run(folder, "--reference", scan, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    document, metrics = json.loads(result.stdout), json.loads((out / "metrics.json").read_text())
    assert {file.name for file in out.iterdir()} == OUTPUTS | {"metrics.json"}
    assert metrics["part_accuracy"] == document["metrics"]["part_accuracy"] == 1
    assert metrics["shape_chamfer"] < 1e-3
    assert (metrics["protocol"], metrics["poses_kept"]) == ("strict", False)
    # The scene is made of the original meshes, in their places, in a colour each.
    scene = trimesh.load(out / "assembled.glb", force="scene")
    assert set(scene.graph.nodes_geometry) == set(document["parts"])
    assert abs(scene.bounds - trimesh.util.concatenate(chair()).bounds).max() < 0.02
    colors = {tuple(mesh.visual.material.baseColorFactor) for mesh in scene.geometry.values()}
    assert len(colors) == len(chair())
    assert len(trimesh.load(out / "assembled.ply").vertices) == 6000
    with Image.open(out / "turntable.png") as picture:
        assert len(picture.getcolors(2**24)) > 50
    page = (out / "viewer.html").read_text()
    assert "__DATA__" not in page
    assert "http" not in page.replace("https://github.com", "")
    poses = json.loads((out / "poses.json").read_text())
    assert poses["units"] == "as the input"
    assert len(poses["hypotheses"]) == document["hypotheses"]
    assert np.allclose(poses["parts"][0]["matrix"], poses["hypotheses"][0]["matrices"][0])


def test_scattered_parts_have_no_truth(tmp_path: Path, scan: Path) -> None:
    folder, out = write(tmp_path / "scattered", reposed(chair(), seed=2)), tmp_path / "out"
    result = run(folder, "--reference", scan, "--out", out, "--json", "--units", "m")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["truth"] is False
    assert {file.name for file in out.iterdir()} == OUTPUTS
    assert json.loads((out / "poses.json").read_text())["units"] == "m"
    bounds = placed(folder, out)
    for box in chair():
        assert min(abs(box.bounds - b).max() for b in bounds) < 0.03


def draft(seed: int) -> list[Any]:
    """The chair with every part off by about 2 cm and 5 degrees."""
    generator = torch.Generator().manual_seed(seed)
    meshes = []
    for mesh in chair():
        turn = trimesh.transformations.rotation_matrix(0.09, torch.randn(3, generator=generator).numpy(), mesh.centroid)
        shift = 0.012 * torch.randn(3, generator=generator, dtype=torch.float64)
        meshes.append(mesh.copy().apply_transform(pose_matrix(torch.eye(3, dtype=torch.float64), shift).numpy() @ turn))
    return meshes


def test_kept_poses_are_mended_and_said_to_be_kept(tmp_path: Path, scan: Path) -> None:
    folder, out = write(tmp_path / "draft", draft(1)), tmp_path / "out"
    assert run(folder, "--reference", scan, "--keep-poses", "--truth", "no", "--out", out).exit_code == 0
    # Each part goes to its own place, not to that of another of its shape: a search could not know which leg is which.
    before = [abs(mesh.bounds - box.bounds).max() for mesh, box in zip(draft(1), chair(), strict=True)]
    after = [abs(bounds - box.bounds).max() for bounds, box in zip(placed(folder, out), chair(), strict=True)]
    assert max(after) < 0.03 < max(before)
    assert np.mean(after) < 0.5 * np.mean(before)
    assert '"as given"' in (out / "viewer.html").read_text()
    result = run(write(tmp_path / "true", chair()), "--reference", scan, "--keep-poses", "--out", tmp_path / "kept")
    assert "started from the true poses" in result.stdout
    metrics = json.loads((tmp_path / "kept" / "metrics.json").read_text())
    assert (metrics["poses_kept"], metrics["part_accuracy"]) == (True, 1)


def test_a_model_is_asked_where_there_is_no_reference(tmp_path: Path, model: Path) -> None:
    folder = write(tmp_path / "chair", chair())
    shared = (folder, "--model", model, "--category", "chair", "--templates", 1, "--hypotheses", 1, "--json")
    result = run(*shared, "--keep-poses", "--refine", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    # The whole lies about the origin, where the model's shapes are, and so does the truth that it is measured by.
    scene = trimesh.load(tmp_path / "out" / "assembled.glb", force="scene")
    assert abs(scene.bounds.mean(0)).max() < 0.25
    assert json.loads(result.stdout)["metrics"]["poses_kept"] is True


# Units


@pytest.mark.parametrize(("scale", "ratio"), [(980, 1000), (27, 25.4), (29, 30.48), (0.0105, 0.01), (5, 5), (11.9, 12)])
def test_scales_near_a_ratio_of_units_are_that(scale: float, ratio: float) -> None:
    assert ratio_near(scale) == pytest.approx(ratio)


def test_a_reference_in_other_units_is_told_of(tmp_path: Path, scan: Path) -> None:
    folder, file = write(tmp_path / "chair", chair()), tmp_path / "mm.npy"
    np.save(file, 1000 * np.load(scan))
    shared = (folder, "--reference", file, "--keep-poses", "--refine", 3)
    result = run(*shared, "--out", tmp_path / "guessed")
    assert result.exit_code == 0, result.output
    assert "1000 times as large" in result.stdout
    assert json.loads((tmp_path / "guessed" / "poses.json").read_text())["scale"] == pytest.approx(1000)
    known = run(*shared, "--units", "m", "--reference-units", "mm", "--out", tmp_path / "known", "--json")
    assert json.loads(known.stdout)["scale"] == 1
    for out in ("guessed", "known"):
        assert json.loads((tmp_path / out / "metrics.json").read_text())["part_accuracy"] == 1


# Bad input: one or two sentences with the value, exit code 2, and what is there stays

BOX = trimesh.creation.box((1, 0.5, 0.2))


def moved(mesh: Any, by: float) -> Any:
    return mesh.copy().apply_translation([by, 0, 0])


def with_mesh(text: str) -> Callable[[Path], Path]:
    """A folder of a box and of a mesh of this text."""

    def make(folder: Path) -> Path:
        write(folder, [BOX])
        (folder / "bad.obj").write_text(text)
        return folder

    return make


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def many(folder: Path) -> Path:
    file = folder.with_suffix(".glb")
    trimesh.Scene({f"{i}": moved(BOX, i) for i in range(65)}).export(file)
    return file


def twins(folder: Path) -> Path:
    write(folder, [BOX, moved(BOX, 1)])
    BOX.export(folder / "0.stl")
    return folder


def arrays(**fields: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder.with_suffix(".npz"), **fields)
        return folder.with_suffix(".npz")

    return make


def pickled(folder: Path) -> Path:
    np.save(folder.with_suffix(".npy"), {"part_pcs": np.zeros((2, 9, 3))}, allow_pickle=True)
    return folder.with_suffix(".npy")


CLOUDS = np.random.default_rng(0).normal(size=(2, 100, 3))
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
BAD_PARTS = {
    "nothing": (lambda folder: folder, "There is no file or folder"),
    "no meshes": (empty_folder, "has no meshes"),
    "one part": (lambda folder: write(folder, [BOX]), "There is 1 part"),
    "65 parts": (many, "There are 65 parts"),
    "empty file": (with_mesh(""), "is empty"),
    "no vertices": (with_mesh("# nothing\n"), "bad"),
    "no faces": (with_mesh("v 0 0 0\nv 1 0 0\nv 0 1 0\n"), "bad.obj' holds no mesh: it has no faces"),
    "no area": (with_mesh("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"), "'bad' has no surface"),
    "NaN": (with_mesh(TRIANGLE.replace("v 1 0", "v nan 0")), "NaN or infinite"),
    "infinite": (with_mesh(TRIANGLE.replace("v 1 0", "v 1e400 0")), "NaN or infinite"),
    "astronomical": (with_mesh(TRIANGLE.replace("v 1", "v 1e200")), "'bad' is too large"),
    "face without vertices": (with_mesh("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n"), "bad.obj"),
    "no mesh": (with_mesh("this is no mesh"), "bad"),
    "duplicate files": (twins, "Two parts are called '0'"),
    "duplicate names": (arrays(part_pcs=CLOUDS, names=["a", "a"]), "Two parts are called 'a'"),
    "no clouds": (arrays(points=CLOUDS), "no `part_pcs`"),
    "NaN clouds": (arrays(part_pcs=np.full((2, 9, 3), np.nan)), "NaN"),
    "clouds of one place": (arrays(part_pcs=np.zeros((2, 9, 3))), "no extent"),
    "pickle": (pickled, "--allow-pickle"),
}  # fmt: skip


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) <= 2


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("kind", BAD_PARTS)
def test_bad_parts_are_refused(tmp_path: Path, scan: Path, kind: str) -> None:
    make, message = BAD_PARTS[kind]
    kept = tmp_path / "out" / "poses.json"
    kept.parent.mkdir()
    kept.write_text("of another run")
    refused(run(make(tmp_path / "parts"), "--reference", scan, "--out", kept.parent), message)
    assert [file.read_text() for file in kept.parent.iterdir()] == ["of another run"]


def test_a_mesh_that_is_too_large_is_refused(tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genkit.data.meshes.MOST_FACES", 20)
    refused(run(write(tmp_path / "p", chair()), "--reference", scan, "--out", tmp_path / "out"), "72 faces, more than 20")


def test_meshes_that_are_not_manifold_are_parts(tmp_path: Path, scan: Path) -> None:
    """Three sheets on one edge, and a box without a lid and with a face twice: both have a surface, which is all that is needed."""
    fan = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1]], [[0, 1, 2], [0, 1, 3], [0, 1, 4]])
    lid = trimesh.Trimesh(BOX.vertices, np.concatenate([BOX.faces[2:], BOX.faces[:1], BOX.faces[:1]]), process=False)
    assert not fan.is_watertight
    assert not lid.is_watertight
    parts = PartSet.from_meshes([fan, lid])
    assert parts.extents.max() == pytest.approx(1)
    result = run(write(tmp_path / "p", [fan, lid]), "--reference", scan, "--out", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()


def save(file: Path, array: Any, **options: Any) -> Path:
    np.save(file, array, **options)
    return file


BAD_REFERENCES = {
    "nothing": (lambda file: file, "There is no file"),
    "few points": (lambda file: save(file, CLOUDS[0, :20]), "at least 64"),
    "flat array": (lambda file: save(file, np.zeros((100, 2))), "(K, 3)"),
    "words": (lambda file: save(file, np.array(["chair"] * 100)), "no cloud of points"),
    "NaN": (lambda file: save(file, np.full((100, 3), np.nan)), "not all finite"),
    "one place": (lambda file: save(file, np.zeros((100, 3))), "one place"),
    "pickle": (lambda file: save(file, np.array([{}], dtype=object), allow_pickle=True), "no cloud of points"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_REFERENCES)
def test_bad_references_are_refused(tmp_path: Path, kind: str) -> None:
    make, message = BAD_REFERENCES[kind]
    file = make(tmp_path / "scan.npy")
    refused(run(write(tmp_path / "p", chair()), "--reference", file, "--out", tmp_path / "out"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--units", "inch"), "Unknown unit 'inch'"),
        (("--units", "m", "--reference-units", "mn"), "Unknown unit 'mn'"),
        (("--reference-units", "mm"), "Give --units too"),
        (("--category", "chair"), "says nothing where --reference"),
        (("--protocol", "strikt"), "Did you mean 'strict'"),
        (("--truth", "perhaps"), "Unknown truth 'perhaps'"),
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, scan: Path, arguments: tuple[str, ...], message: str) -> None:
    refused(run(write(tmp_path / "p", chair()), "--reference", scan, "--out", tmp_path / "out", *arguments), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--category", "chiar"), "Did you mean 'chair'"),
        (("--model", "nothing"), "Unknown model 'nothing'"),
        (("--model", "digits"), "no model of point clouds"),
    ],
)
def test_models_and_categories_that_are_not_there_are_told(
    tmp_path: Path, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    chosen = arguments if "--model" in arguments else ("--model", model, *arguments)
    refused(run(write(tmp_path / "p", chair()), "--out", tmp_path / "out", *chosen), message)
    assert not (tmp_path / "out").exists()
