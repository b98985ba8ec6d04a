"""`genkit train dreamteacher`, on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from tests.processes import two_processes

SHORT = ("--backbone", "resnet10t", "--size", 32, "--steps", 2, "--batch", 4, "--warmup", 1, "--device", "cpu")


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["train", "dreamteacher", *map(str, arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(8):
        for kind, shape in (("photos", (20, 24, 3)), ("masks", (20, 24))):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 255 if kind == "photos" else 3, shape, np.uint8)).save(folder / kind / f"{i}.png")
    return folder


def test_a_backbone_of_a_folder(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["--data", photos / "photos", "--teacher", tiny_folder, "--out", tmp_path / "run", *SHORT]
    assert "Would train resnet10t" in genkit(*line, "--dry-run").stdout
    assert not (tmp_path / "run").exists()
    document = json.loads(genkit(*line, "--json", "--quiet").stdout)
    assert document["pictures"] == 8
    assert document["taps"] == {"up.0.pre": [16, 4, 4], "up.1": [8, 8, 8]}
    assert document["config"]["t"] == [50]
    network = timm.create_model(f"local-dir:{tmp_path / 'run' / 'backbone'}", pretrained=True, num_classes=2)
    assert network.num_features == 512
    assert "already holds a run. Go on with it (--resume)" in genkit(*line, code=2).stderr
    assert "Trained resnet10t" in genkit(*line, "--resume").stdout
    assert "it has mse 1.0, but here it is mse 2.0" in genkit(*line, "--resume", "--mse", 2, code=2).stderr


def test_labels_of_a_few(photos: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genkit.distill import dreamteacher

    short = dreamteacher.train_interpreter
    monkeypatch.setattr(
        dreamteacher, "train_interpreter",
        lambda *a, **k: short(*a[:4], type(a[4])(steps=2, batch_size=2, warmup=1, bf16=False), *a[5:], **k),
    )  # fmt: skip
    line = ["--data", photos / "photos", "--teacher", tiny_folder, *SHORT, "--task", "segmentation", "--labelled", 4]
    document = json.loads(genkit(*line, "--masks", photos / "masks", "--out", tmp_path / "run", "--json", "--quiet").stdout)
    assert document["labels"] == ["0", "1", "2"]
    assert "soft labels (segmentation)" in (tmp_path / "run" / "backbone" / "README.md").read_text()
    assert "'photos' has no label maps" in genkit(*line, "--out", tmp_path / "other", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "There is no data 'nowhere'"),
        (("--teacher", "digit"), "Unknown model 'digit'"),
        (("--backbone", "resnet19"), "Unknown backbone 'resnet19'"),
        (("--preset", "paper"), "Unknown preset 'paper'"),
        (("--t", "soon"), "--t 'soon' is not a timestep"),
        (("--taps", "middle"), "has no tap 'middle'"),
        (("--size", 64, "--taps", "block.1", "--backbone", "vit_tiny_patch16_224", "--regressor", "fpn"), "gives 8 x 8 maps"),
        (("--encoding", "dim"), "Unknown encoding 'dim'"),
        (("--task", "detection"), "Unknown task 'detection'"),
        (("--device", "gpu"), "Unknown device 'gpu'"),
    ],
)
def test_what_is_refused(arguments: tuple[object, ...], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    given = ["--data", "digits", "--count", 8, "--teacher", tiny_folder, "--out", tmp_path / "run", *SHORT, *arguments]
    assert message in genkit(*given, code=2).stderr


def test_two_processes_train_one_backbone(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Not that of one process: noise and the statistics of BatchNorm are those of each one's part of the batch."""
    run = tmp_path / "run"
    line = ["--data", photos / "photos", "--teacher", tiny_folder, "--out", run, *SHORT, "--steps", 50]
    code, stdout, stderr = two_processes(["train", "dreamteacher", *map(str, line), "--json"])
    assert code == 0, stderr
    assert json.loads(stdout)["pictures"] == 8
    first, second = (json.loads((run / "training" / name).read_text()) for name in ("log.jsonl", "log1.jsonl"))
    assert first["step"] == second["step"] == 50
    assert first["loss"] != second["loss"]  # each had another part of the batch
    timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True, num_classes=2)
    assert "Trained resnet10t" in genkit(*line, "--resume").stdout
