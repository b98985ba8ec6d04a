"""`genkit features` and `genkit train probe`, on the tiny random model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.cli.features import parse_pool, parse_taps, parse_times
from genkit.features import FeatureCache, Probe
from genkit.runner import load
from tests.processes import stopped, two_processes


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of two classes, dark and bright ones."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        name, low = (("dark", 0), ("bright", 160))[i % 2]
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(low, low + 90, (20, 24, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_features_of_a_folder(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["features", photos, "--model", tiny_folder, "--taps", "mid,-1", "--t", "50,300", "--draws", 2, "--out", tmp_path / "f"]
    document = json.loads(genkit(*line, "--json").stdout)
    assert document["shapes"] == {"mid": [12, 2, 2, 16, 2, 2], "block.9": [12, 2, 2, 8, 2, 2]}
    assert document["images"] == 12
    cache = FeatureCache(tmp_path / "f")
    assert (cache.names[0], cache.labels[0]) == ("bright/1.png", "bright")
    assert np.load(tmp_path / "f" / "block.9.npy", mmap_mode="r").dtype == np.float16
    assert "already holds these features. Use --resume" in genkit(*line, code=2).stderr
    assert "Features of 12 images" in genkit(*line, "--resume").stdout
    assert "made with seed 0, but 1 is wanted" in genkit(*line, "--resume", "--seed", 1, code=2).stderr


def test_features_of_the_embedded_digits(tiny_folder: Path, tmp_path: Path) -> None:
    line = ["features", "digits-test", "--count", 5, "--model", tiny_folder, "--pool", "mean", "--storage", "float32"]
    assert genkit(*line, "--out", tmp_path / "f", "--quiet").stdout == ""
    cache = FeatureCache(tmp_path / "f")
    assert cache["mid"].shape == (5, 1, 16)
    assert cache.names[0].startswith("test digit ")


def test_dry_run_does_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    assert "Would save features" in genkit("features", "digits", "--model", tiny_folder, "--out", out, "--dry-run").stdout
    text = genkit("train", "probe", "--model", tiny_folder, "--out", out, "--taps", "mid", "--dry-run").stdout
    assert "Would train a linear probe on digits at mid" in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no data 'nowhere'"),
        (["digits", "--taps", "middle"], "has no tap 'middle'. Close names: mid"),
        (["digits", "--taps", ","], "--taps is empty"),
        (["digits", "--t", "1000"], "t=1000 is out of range"),
        (["digits", "--t", "soon"], "--t 'soon' is not a timestep"),
        (["digits", "--pool", "0"], "--pool '0' must be a positive number, mean or none"),
        (["digits", "--storage", "int8"], "Unknown dtype 'int8'"),
        (["digits", "--dtype", "float8"], "Unknown dtype 'float8'"),
        (["digits", "--device", "gpu"], "Unknown device 'gpu'"),
        (["digits", "--model", "digit"], "Unknown model 'digit'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["features", "--model", tiny_folder, *arguments, "--out", tmp_path / "f", "--count", 2]
    assert message in genkit(*line, code=2).stderr


def test_a_folder_without_images_or_with_a_damaged_one(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = ["--model", tiny_folder, "--out", tmp_path / "f"]
    assert "holds no images" in genkit("features", tmp_path / "empty", *line, code=2).stderr
    (tmp_path / "empty" / "x.png").write_bytes(b"no image")
    assert "x.png' cannot be read" in genkit("features", tmp_path / "empty", *line, code=2).stderr


def test_parsing() -> None:
    assert parse_taps(" block.6, -1,3,mid,") == ["block.6", -1, 3, "mid"]
    assert parse_times("150") == 150
    assert parse_times("90, 150") == [90, 150]
    assert [parse_pool(text) for text in ("4", "mean", "none")] == [4, "mean", None]


def test_train_probe_on_a_folder(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["train", "probe", "--data", photos, "--test", photos, "--model", tiny_folder, "--taps", "mid", "--t", 20]
    document = json.loads(genkit(*line, "--labels-per-class", 4, "--out", tmp_path / "p", "--json").stdout)
    assert document["labels"] == ["bright", "dark"]
    assert document["images"] == 8
    assert 0 <= document["test_accuracy"] <= 1
    probe = Probe.load(tmp_path / "p", load(str(tiny_folder)).denoiser)
    assert probe.config.taps == ("mid",)
    quick = ["--updates", 3, "--batch", 4, "--width", 8, "--depth", 1]
    text = genkit(*line, "--head", "attention", *quick, "--out", tmp_path / "a").stdout
    assert "Trained the attention probe on 12 images" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "linaer"], "Unknown head 'linaer'. Did you mean 'linear'?"),
        (["--head", "fusion"], "The fusion head takes several taps or several t"),
        (["--labels-per-class", "7"], "has 6 images, but 7 of each class are wanted"),
        (["--test", "digits-test"], "Unknown class '"),
        (["--width", "6", "--head", "attention"], "width=6 is no multiple of num_heads=4"),
    ],
)
def test_bad_input_of_train_probe(arguments: list[str], message: str, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["train", "probe", "--data", photos, "--model", tiny_folder, "--taps", "mid", "--out", tmp_path / "p", *arguments]
    assert message in genkit(*line, code=2).stderr


def test_a_folder_without_classes_trains_no_probe(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["train", "probe", "--data", photos / "dark", "--model", tiny_folder, "--taps", "mid", "--out", tmp_path / "p"]
    assert "has no labels. Put the images of each class in a folder of its own" in genkit(*line, code=2).stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_keeps_what_is_finished(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    line = ["features", "digits", "--model", str(tiny_folder), "--draws", "8", "--batch", "2", "--out", str(out)]
    code, stdout, stderr = stopped([*line, "--json"], (out / "done-0.json").exists)
    assert code == 130, stderr
    assert "Repeat the command with --resume" in stderr
    assert json.loads(stdout)["interrupted"]
    assert 0 in json.loads((out / "done-0.json").read_text())
    assert not list(out.glob(".*"))


def test_two_processes_make_what_one_makes(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["features", "digits", "--count", "100", "--model", str(tiny_folder), "--taps", "mid", "--device", "cpu", "--out"]
    code, stdout, stderr = two_processes([*line, str(tmp_path / "two"), "--json"])
    assert code == 0, stderr
    assert json.loads(stdout)["images"] == 100
    genkit(*line, tmp_path / "one")
    one, two = (np.load(tmp_path / name / "mid.npy") for name in ("one", "two"))
    assert np.abs(one.astype(float) - two.astype(float)).max() <= 2e-3


def test_two_processes_train_the_probe_of_one(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["train", "probe", "--data", str(photos), "--model", str(tiny_folder), "--taps", "mid", "--t", "20", "--device", "cpu"]
    code, stdout, stderr = two_processes([*line, "--out", str(tmp_path / "two"), "--json"])
    assert code == 0, stderr
    assert json.loads(stdout)["images"] == 12
    genkit(*line, "--out", tmp_path / "one")
    denoiser = load(str(tiny_folder)).denoiser
    one, two = (Probe.load(tmp_path / name, denoiser).head.state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
