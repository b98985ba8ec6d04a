"""Faults of the machine: a full disk, folders that cannot be written, damaged caches and checkpoints, a clock that jumps.

Killed processes are in `test_kill.py`, damaged files of all readers in `test_fuzz.py`, distillation's own in `tests/distill`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.data.source import open_source
from genkit.denoisers import Denoiser
from genkit.features import FeatureCache, FeatureExtractor
from genkit.features.cache import PIECE
from genkit.guidance.training.discriminator import SHARD, _Pool
from genkit.journal import Journal
from genkit.ranks import Ranks
from genkit.training import TrainConfig, _Run
from tests import tiny


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """A disk on which so many more files fit: then flushing one fails, as writing to a full one does."""
    flush, left = os.fsync, [after]

    def fail(number: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def identities(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()}


# A full disk


def test_sampling_on_a_full_disk(tiny_folder: Path, tmp_path: Path) -> None:
    line = [
        "sample",
        "a red seven",
        "--model",
        tiny_folder,
        "--steps",
        1,
        "--seeds",
        "0-2",
        "--batch",
        1,
        "--out",
        tmp_path / "out",
    ]
    with full_disk(after=4):  # the trial of the folder, a picture with its side-car, a picture without
        message = genkit(*line, code=2).stderr
    assert "No space left on device" in message
    assert "make room, and repeat the command with --resume" in message
    before = identities(tmp_path / "out")
    assert sorted(name.partition(".")[2] for name in before) == ["json", "png", "png"]  # and nothing half-written
    result = genkit(*line, "--resume", "--json")
    document = json.loads(result.stdout)
    assert [image["resumed"] for image in document["images"]] == [True, False, False]
    after = identities(tmp_path / "out")
    whole = next(name for name in before if name.endswith("json")).removesuffix("json")
    for suffix in ("png", "json"):
        assert after[whole + suffix] == before[whole + suffix]


def test_a_journal_on_a_full_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl", {"model": "digits"})
    journal.append({"image": "a.png"})
    with full_disk(after=0), pytest.raises(OSError, match="No space left"):
        journal.append({"image": "b.png"})
    with open(journal.path, "ab") as file:
        file.write(b'{"image": "c.p')  # as far as there was room
    assert {"image": "a.png"} in journal.records()
    journal.append({"image": "d.png"})
    assert journal.records()[-1] == {"image": "d.png"}


def run(folder: Path, steps: int = 3) -> _Run:
    torch.manual_seed(0)
    config = TrainConfig(steps=steps, batch_size=1, lr=1e-2, bf16=False)
    return _Run(torch.nn.Linear(2, 1), config, folder, "tiny", "cpu", Ranks())


def test_a_training_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    trained = run(tmp_path)
    trained.step = 1
    trained.save()
    trained.step = 2
    with full_disk(after=0), pytest.raises(OSError, match=r"checkpoint.pt' could not be written .*Is the disk full\?"):
        trained.save()
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    again = run(tmp_path)
    again.restore()
    assert again.step == 1


# Features: a full disk, and a cache that is damaged


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """An extractor, a source of three pieces, and their features."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(2 * PIECE + 5):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    extractor = FeatureExtractor(Denoiser.of(tiny.pipeline("stable_diffusion")), "mid", t=100, pool=1)
    source = open_source(folder)
    cache = FeatureCache.build(extractor, source, tmp_path_factory.mktemp("features"))
    return SimpleNamespace(extractor=extractor, source=source, folder=cache.folder, values=np.array(cache["mid"]))


@pytest.fixture
def copied(features: SimpleNamespace, tmp_path: Path) -> Path:
    return shutil.copytree(features.folder, tmp_path / "features")


def test_features_on_a_full_disk(features: SimpleNamespace, tmp_path: Path) -> None:
    with full_disk(after=4), pytest.raises(OSError, match="No space left"):  # the folder, the record, a piece, its note
        FeatureCache.build(features.extractor, features.source, tmp_path)
    assert json.loads((tmp_path / "done-0.json").read_text()) == [0]
    made: list[int] = []
    cache = FeatureCache.build(features.extractor, features.source, tmp_path, resume=True, progress=made.append)
    assert made[0] == PIECE
    assert np.array_equal(cache["mid"], features.values)


@pytest.mark.parametrize("damage", [b"", b"[0, 64", b'"all"', b"[[0]]", b"\xff\xfe"])
def test_pieces_whose_note_is_damaged_are_made_again(damage: bytes, features: SimpleNamespace, copied: Path) -> None:
    (copied / "done-0.json").write_bytes(damage)
    with pytest.raises(ValueError, match="are not finished: 3 of 3 pieces"):
        FeatureCache(copied)
    cache = FeatureCache.build(features.extractor, features.source, copied, resume=True)
    assert np.array_equal(cache["mid"], features.values)


@pytest.mark.parametrize("keep", [0, 60, 1000])
def test_an_array_that_is_cut_off_is_named(keep: int, features: SimpleNamespace, copied: Path) -> None:
    content = (copied / "mid.npy").read_bytes()
    (copied / "mid.npy").write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"mid.npy' is missing or damaged. Remove the folder and make the features again"):
        FeatureCache(copied)["mid"]
    with pytest.raises(ValueError, match="is missing or damaged"):
        FeatureCache.build(features.extractor, features.source, copied, resume=True)


@pytest.mark.parametrize("change", [{"groups": [0]}, {"labels": "none"}, {"settings": {"data": {"rows": 3}}}])
def test_a_damaged_record_is_named(change: dict[str, Any], copied: Path) -> None:
    record = json.loads((copied / "features.json").read_text())
    (copied / "features.json").write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=r"features.json' is damaged. Remove the folder and make the features again"):
        FeatureCache(copied)


# Checkpoints that are cut off


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_truncated_training_checkpoint_is_named(keep: float, tmp_path: Path) -> None:
    run(tmp_path).save()
    file = tmp_path / "checkpoint.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"checkpoint.pt' is damaged, or of another run .* Remove it to start again"):
        run(tmp_path).restore()


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    run(tmp_path).save()
    other = _Run(torch.nn.Linear(3, 1), run(tmp_path).config, tmp_path, "tiny", "cpu", Ranks())
    with pytest.raises(ValueError, match="is damaged, or of another run"):
        other.restore()


@pytest.mark.parametrize("content", [b"", save({"samples": torch.zeros(2, 3)})[:-4], save({"others": torch.zeros(1)})])
def test_truncated_samples_of_a_discriminator_are_named(content: bytes, tmp_path: Path) -> None:
    samples = object.__new__(_Pool)  # no model: only what reads the files
    samples.folder, samples.config = tmp_path, SimpleNamespace(count=SHARD)
    (tmp_path / "real-00000000.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"real-00000000.safetensors' are truncated or damaged .*go on with --resume"):
        samples.samples("real")


# Folders that cannot be written, and the clock


@pytest.mark.parametrize("command", ["features", "synth", "make-furniture", "reproduce"])
def test_output_below_a_file(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    """What a folder without permission is to everybody, also to root."""
    (tmp_path / "file").write_text("")
    picture = Image.new("RGB", (16, 16))
    (tmp_path / "images" / "a").mkdir(parents=True)
    picture.save(tmp_path / "images" / "a" / "0.png")
    (tmp_path / "labels.txt").write_text("a\nb\n")
    lines = {
        "features": [tmp_path / "images", "--model", tiny_folder, "--taps", "mid", "--t", 100],
        "synth": ["--teacher", tiny_folder, "--prompt", "a", "--steps", 1],
        "make-furniture": ["--category", "chair"],
        "reproduce": ["diffusion-classifier-cifar10", "--model", tiny_folder, "--data", tmp_path],
    }
    message = genkit(command, *lines[command], "--out", tmp_path / "file" / "out", code=2).stderr
    assert "is or lies below a file" in message


def test_a_clock_that_jumps_back_changes_nothing(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from the future, or from 1970, are as good as others, and so is a run during which the clock is set back."""
    line = ["sample", "a red seven", "--model", tiny_folder, "--steps", 1, "--seeds", "0-1", "--no-grid", "--json"]
    genkit(*line, "--out", tmp_path / "one")
    files = sorted((tmp_path / "one").iterdir())
    for file, moment in zip(files, (0, 4_000_000_000, 0, 4_000_000_000), strict=True):
        os.utime(file, (moment, moment))
    document = json.loads(genkit(*line, "--out", tmp_path / "one", "--resume").stdout)
    assert [image["resumed"] for image in document["images"]] == [True, True]
    clock = iter(range(10**6, 0, -100))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    document = json.loads(genkit(*line, "--out", tmp_path / "two").stdout)
    assert document["seconds"] >= 0
    for file in files:
        if file.suffix == ".png":
            assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
