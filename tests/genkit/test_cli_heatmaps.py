"""`genkit sample --heatmaps`, `--attention-entropy` and `genkit attention bench`: what they write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.attention.bench import NOT_RUN, SHAPES
from genkit.cli.app import app
from genkit.data.pictures import find_pictures

PROMPT = "a red seven on paper"


def genkit(*arguments: object, code: int = 0):
    """Run a command in this process; every test says which exit code it expects."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two prompts x two seeds with all that can be recorded, and what --json said."""
    out = tmp_path_factory.mktemp("made")
    line = ("sample", PROMPT, "blue cat", "--model", tiny_folder, "--seeds", "0-1", "--steps", 2, "--out", out)
    return out, json.loads(genkit(*line, "--heatmaps", "--attention-entropy", "--json").stdout)


def test_writes_an_overlay_and_arrays_for_each_image(made: tuple[Path, dict]) -> None:
    out, document = made
    files = sorted(path.name for path in out.iterdir())
    assert len([name for name in files if name.endswith(".png")]) == 5  # the images and the contact sheet, nothing else
    assert "heatmaps" in files
    for entry in document["images"]:
        sheet = Path(entry["heatmaps"])
        assert sheet == out / "heatmaps" / Path(entry["file"]).name
        words = ["a", "red", "seven", "on", "paper"] if entry["prompt"] == PROMPT else ["blue", "cat"]
        with np.load(sheet.with_suffix(".npz")) as arrays:
            assert arrays["words"].tolist() == words
            assert arrays["mean"].shape == (len(words), 8, 8)
            assert 0 < arrays["mean"].min() <= arrays["mean"].max() < 1
        with Image.open(sheet) as picture:
            assert picture.height > len(words) * 90


def test_recording_changes_no_image(made: tuple[Path, dict], tiny_folder: Path, tmp_path: Path) -> None:
    genkit("sample", PROMPT, "blue cat", "--model", tiny_folder, "--seeds", "0-1", "--steps", 2, "--out", tmp_path)
    assert not (tmp_path / "heatmaps").exists()
    for path in tmp_path.glob("*-s*.png"):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(made[0] / path.name)))
        assert "attention_entropy" not in json.loads(path.with_suffix(".json").read_text())


def test_entropies_are_in_the_side_car(made: tuple[Path, dict]) -> None:
    for entry in made[1]["images"]:
        found = json.loads(Path(entry["file"]).with_suffix(".json").read_text())["attention_entropy"]
        assert 0 < found["mean"] <= 1
        assert len(found["modules"]) == 8
        assert all(0 <= row["entropy"] <= np.log(row["keys"]) + 1e-4 for row in found["modules"].values())


def test_shards_hold_the_same_maps(made: tuple[Path, dict], tiny_folder: Path, tmp_path: Path) -> None:
    line = ("sample", PROMPT, "blue cat", "--model", tiny_folder, "--seeds", "0-1", "--steps", 2, "--out", tmp_path, "--heatmaps")
    found = json.loads(genkit(*line, "--attention-entropy", "--shards", "--json").stdout)["images"]
    for entry, whole in zip(found, made[1]["images"], strict=True):
        shard = Path(entry["file"]).parent.name
        assert Path(entry["heatmaps"]) == tmp_path / "heatmaps" / shard / Path(whole["file"]).name
        assert Path(entry["heatmaps"]).with_suffix(".npz").read_bytes() == Path(whole["heatmaps"]).with_suffix(".npz").read_bytes()
    assert all(entry["resumed"] for entry in json.loads(genkit(*line, "--shards", "--resume", "--json").stdout)["images"])
    assert len(find_pictures([tmp_path])) == len(found)  # a command that reads the folder sees no map in it


def test_resume_makes_what_has_no_heat_maps_yet(tiny_folder: Path, tmp_path: Path) -> None:
    line = ("sample", PROMPT, "--model", tiny_folder, "--seeds", "0-1", "--steps", 1, "--out", tmp_path, "--json")
    genkit(*line)
    first = json.loads(genkit(*line, "--resume", "--heatmap-words", "Red,seven").stdout)
    assert [entry["resumed"] for entry in first["images"]] == [False, False]
    (tmp_path / "heatmaps" / Path(first["images"][1]["file"]).with_suffix(".npz").name).unlink()
    again = json.loads(genkit(*line, "--resume", "--heatmap-words", "Red,seven").stdout)
    assert [entry["resumed"] for entry in again["images"]] == [True, False]
    with np.load(Path(again["images"][0]["heatmaps"]).with_suffix(".npz")) as arrays:
        assert arrays["words"].tolist() == ["red", "seven"]
    entropies = json.loads(genkit(*line, "--resume", "--attention-entropy").stdout)
    assert [entry["resumed"] for entry in entropies["images"]] == [False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT, "--heatmap-words", "red,cat"), "Unknown word of the prompt 'a red seven on paper' 'cat'"),
        (("", "--heatmaps"), "no words to make heat maps of"),
        ((PROMPT, "--heatmap-words", ","), "names no word"),
    ],
)
def test_words_that_there_are_not(arguments: tuple[str, ...], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Said before anything is loaded, in a dry run too."""
    result = genkit("sample", *arguments, "--model", tiny_folder, "--out", tmp_path / "out", "--dry-run", code=2)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_guidance_by_attention(tiny_folder: Path, tmp_path: Path) -> None:
    line = ("sample", PROMPT, "--model", tiny_folder, "--steps", 2, "--out", tmp_path, "--json")
    document = json.loads(genkit(*line, "--guidance", "attend:words=red+seven,scale=5").stdout)
    assert document["images"][0]["recipe"]["guidance"] == ["attend:words=red+seven,scale=5"]
    result = genkit(*line, "--guidance", "attend:words=cat", code=2)
    assert "Unknown word of the prompt" in result.stderr


# Bench


def test_shapes_are_those_of_the_models_and_scale_with_the_image() -> None:
    assert {shape.D for shapes in SHAPES.values() for shape in shapes} == {40, 64, 80, 128}
    text = SHAPES["sd15"][1].smaller(4)
    assert (text.L, text.S) == (256, 77)
    joint = SHAPES["flux"][0].smaller(4)
    assert joint.L == joint.S == 256 + 512


def test_bench_measures_what_runs_and_says_why_the_rest_does_not(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    line = ("attention", "bench", "--models", "sd15", "--rounds", 1, "--no-gradient", "--device", "cpu", "--out", file)
    document = json.loads(genkit(*line, "--json").stdout)
    assert document == json.loads(file.read_text())
    assert document["machine"]["gpu"] == NOT_RUN
    assert {"torch", "diffusers", "triton"} <= set(document["machine"]["versions"])
    rows = {(row["layer"], row["task"], row["way"]): row for row in document["rows"]}
    for task, ways in {
        "attention": ["dense", "flash"],
        "statistics": ["dense", "algebra"],
        "derivative": ["dense", "algebra"],
    }.items():
        for way in ways:
            row = rows["self, 64 x 64", task, way]
            assert row["ms"] > 0
            assert row["tflops"] > 0
            assert row["mb"] > 0
    assert "CUDA" in rows["self, 64 x 64", "statistics", "kernel"]["reason"]
    assert rows["self, 64 x 64", "statistics", "algebra"]["mb"] < rows["self, 64 x 64", "statistics", "dense"]["mb"] / 4
    table = genkit(*line[:-2]).stdout
    assert NOT_RUN in table
    assert "Not run: kernel" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "sd2"), "Unknown model 'sd2'"),
        (("--models", ","), "names no model"),
        (("--dtype", "int8"), "Unknown dtype 'int8'"),
        (("--device", "tpu"), "Unknown device 'tpu'"),
        (("--out", "."), "is a folder"),
    ],
)
def test_bench_refuses(arguments: tuple[str, ...], message: str) -> None:
    assert message in genkit("attention", "bench", *arguments, code=2).stderr
