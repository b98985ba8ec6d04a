"""`genkit eval`: its figures are those of the functions, whatever the input and the processes; what it refuses; its cache."""

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
from genkit.data import digits
from genkit.images import save_png
from genkit.metrics.frechet import frechet_distance
from genkit.metrics.manifold import manifold_metrics
from genkit.recipe import CHUNK, Recipe
from genkit.zoo.quality import held_out, judged, load_judge
from tests import tiny
from tests.guidance.test_clip import tiny_clip
from tests.processes import two_processes

COUNT = 30
DISTANCES = ["fid", "kid", "precision", "recall", "density", "coverage"]


def evaluate(*arguments: object, code: int = 0):
    """Run `genkit eval` in this process; every test says which exit code it expects."""
    result = CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


def document(*arguments: object) -> dict:
    return json.loads(evaluate(*arguments, "--json").stdout)


def as_bytes(images: torch.Tensor) -> np.ndarray:
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


NO_TEXT = np.frombuffer(b"\xff\xff\xff\xff", "<U1")


@pytest.fixture(scope="module")
def batch() -> digits.DigitBatch:
    return digits.draw("train", COUNT, seed=5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(batch: digits.DigitBatch, tmp_path: Path) -> Path:
    """Pictures of digits without any text."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(as_bytes(batch.images)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02d}.png")
    return tmp_path / "photos"


@pytest.fixture
def made(batch: digits.DigitBatch, tmp_path: Path) -> Path:
    """What `genkit sample` leaves: pictures with recipes, of which the first asks for another digit, a contact sheet, heat maps."""
    (tmp_path / "made" / "heatmaps").mkdir(parents=True)
    wrong = digits.caption((batch.digit[0].item() + 1) % 10, batch.ink[0].item())
    captions = [wrong, "a digit", *batch.captions()[2:]]
    for i, (pixels, caption) in enumerate(zip(as_bytes(batch.images), captions, strict=True)):
        save_png(Image.fromarray(pixels), tmp_path / "made" / f"{i:02d}.png", {CHUNK: Recipe(prompt=caption).to_json()})
    for name in ("grid.png", "heatmaps/00.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / "made" / name)
    return tmp_path / "made"


class TestFigures:
    def test_they_are_those_of_the_functions(self, photos: Path) -> None:
        found = document(photos, "--reference", "digits", "--bootstrap", 20)
        assert set(found) == {"folder", "images", "reference", "features", "resized", "metrics", "warnings", "seconds"}
        assert found["images"] == COUNT
        assert found["reference"] == {"name": "digits", "images": 1000}
        assert list(found["metrics"]) == DISTANCES
        judge = load_judge()
        pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(photos.iterdir())])
        ours = judged(judge, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)[1]
        theirs = judged(judge, held_out(1000).images)[1]
        values = {name: row["value"] for name, row in found["metrics"].items()}
        assert values["fid"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-4)
        for name, value in manifold_metrics(ours, theirs).items():
            assert values[name] == pytest.approx(value, abs=1e-3)
        for row in found["metrics"].values():
            assert row["low"] <= row["value"] <= row["high"]

    def test_a_folder_and_an_npz_are_the_same(self, photos: Path, batch: digits.DigitBatch, tmp_path: Path) -> None:
        pixels = as_bytes(batch.images)
        np.savez(tmp_path / "bytes.npz", pixels)
        np.savez(tmp_path / "floats.npz", images=pixels.transpose(0, 3, 1, 2) / 127.5 - 1, labels=batch.digit.numpy())
        line = ("--reference", tmp_path / "bytes.npz", "--bootstrap", 0)
        folder = document(photos, *line)["metrics"]
        assert document(tmp_path / "bytes.npz", *line)["metrics"] == folder
        labelled = document(tmp_path / "floats.npz", *line)["metrics"]
        assert labelled.pop("digit")["value"] > 0.9
        assert labelled == folder
        assert folder["fid"]["value"] == pytest.approx(0, abs=1e-4)  # of 30 rows with 128 columns
        assert folder["recall"]["value"] == 1

    def test_accuracy_by_recipes(self, made: Path) -> None:
        """The first asks for another digit and no paper, the second for nothing in particular; the sheet is no sample."""
        found = document(made)
        assert (found["images"], found["reference"], found["warnings"]) == (COUNT, None, [])
        counts = {name: row["count"] for name, row in found["metrics"].items()}
        assert counts == {"digit": COUNT - 1, "ink": COUNT - 1, "paper": COUNT - 2}
        assert found["metrics"]["digit"]["value"] <= (COUNT - 2) / (COUNT - 1)
        assert found["metrics"]["ink"]["value"] > 0.9

    def test_accuracy_by_folders_and_by_captions(self, batch: digits.DigitBatch, tmp_path: Path) -> None:
        for i, pixels in enumerate(as_bytes(batch.images)):
            file = tmp_path / "classes" / digits.DIGITS[batch.digit[i]] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
        assert document(tmp_path / "classes")["metrics"]["digit"]["value"] > 0.9
        lines = [
            {"file_name": str(file.relative_to(tmp_path / "classes")), "text": "nothing that is known"}
            for file in (tmp_path / "classes").rglob("*.png")
        ]
        (tmp_path / "classes" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert list(document(tmp_path / "classes")["metrics"]) == ["digit"]  # the folder still says it

    def test_clip(self, made: Path, tmp_path: Path) -> None:
        tiny_clip().save_pretrained(tmp_path / "clip")
        tiny.clip_tokenizer().save_pretrained(tmp_path / "clip")
        row = document(made, "--metrics", "clip", "--clip", tmp_path / "clip")["metrics"]["clip"]
        assert row["count"] == COUNT
        assert row["low"] <= row["value"] <= row["high"]

    def test_pictures_of_other_sizes_are_said(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "wide").mkdir()
        for i in range(8):
            Image.new("RGB", (64, 48), (20 * i, 0, 0)).save(tmp_path / "wide" / f"{i}.png")
        result = evaluate(tmp_path / "wide", "--reference", photos, "--bootstrap", 0)
        assert "8 images of the sample are not 32 x 32: they are scaled until they cover it" in result.stderr
        assert document(tmp_path / "wide", "--reference", photos)["resized"] == {"images": 8, "reference": 0}

    def test_a_choice_of_the_images(self, photos: Path) -> None:
        line = (photos, "--reference", "digits", "--count", 20, "--metrics", "fid", "--bootstrap", 0)
        assert document(*line)["metrics"] == document(*line)["metrics"]
        assert document(*line)["metrics"] != document(*line, "--seed", 1)["metrics"]
        assert document(*line)["images"] == 20
        assert "has 30 images, fewer than --count 31" in evaluate(photos, "--reference", "digits", "--count", 31, code=2).stderr

    def test_people_get_a_table_and_warnings(self, photos: Path) -> None:
        result = evaluate(photos, "--reference", "digits", "--metrics", "fid,recall", "--bootstrap", 5)
        assert "recall" in result.stdout
        assert "30 images of" in result.stdout
        assert "covariances of 128 features need more than 128 images" in result.stderr
        assert "recall of 30 images" in result.stderr
        quiet = evaluate(photos, "--reference", "digits", "--metrics", "fid", "--bootstrap", 5, "--quiet")
        assert quiet.stdout == quiet.stderr == ""


class TestTooFew:
    def test_five_images_have_what_five_can_have(self, photos: Path) -> None:
        found = document(photos, "--reference", "digits", "--count", 5)
        assert list(found["metrics"]) == ["fid", "kid"]
        assert "recall needs at least 6 images on either side; there are 5, and 1000 in the reference." in found["warnings"]

    def test_one_image_has_nothing(self, photos: Path) -> None:
        line = (photos / "00.png").parent, "--count", 1, "--reference", "digits"
        assert "nothing to measure 1 image by. fid needs at least 2" in evaluate(*line, code=2).stderr
        assert "kid needs at least 4 images" in evaluate(*line, "--metrics", "kid", code=2).stderr


class TestBadInput:
    @pytest.mark.parametrize(
        ("line", "says"),
        [
            (("nowhere", "--reference", "digits"), "no folder or file 'nowhere'"),
            (("{empty}", "--reference", "digits"), "holds no images"),
            (("{photos}",), "nothing to measure 30 images by. Give --reference"),
            (("{photos}", "--reference", "digts"), "There is no reference 'digts'"),
            (("{photos}", "--reference", "{photos}/00.png"), "is a file, but no .npz"),
            (("{photos}", "--metrics", "fdi", "--reference", "digits"), "Unknown metric 'fdi'. Did you mean 'fid'"),
            (("{photos}", "--metrics", "fid"), "fid compares with a reference"),
            (("{photos}", "--metrics", ","), "names no metric"),
            (("{photos}", "--metrics", "clip"), "needs a CLIP model"),
            (("{photos}", "--metrics", "accuracy"), "accuracy needs to know what each image should show"),
            (("{photos}", "--reference", "digits", "--features", "dinov2"), "weights of dinov2 are not here"),
            (("{photos}", "--reference", "digits", "--features", "vgg"), "Unknown features 'vgg'"),
            (("{photos}", "--steps", "3"), "no model to sample with"),
            (("{photos}", "--model", "digits"), "There is no prompt"),
            (("{photos}", "--model", "digits", "--captions", "cats"), "Unknown captions 'cats'"),
            (("{photos}", "--model", "digits", "--captions", "digits", "--prompt", "a"), "Both --captions and prompts"),
            (("{photos}", "--model", "digist", "--prompt", "a"), "Did you mean 'digits'"),
            (("{photos}", "--device", "gpu"), "Unknown device 'gpu'"),
        ],
    )
    def test_it_is_said(
        self, line: tuple[str, ...], says: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        (tmp_path / "empty").mkdir()
        filled = [part.format(empty=tmp_path / "empty", photos=photos) for part in line]
        result = evaluate(*filled, code=2)
        assert says in result.stderr
        assert "Traceback" not in result.output

    def test_an_image_that_cannot_be_read(self, photos: Path) -> None:
        (photos / "07.png").write_bytes(b"no picture")
        assert "07.png' cannot be read" in evaluate(photos, "--reference", "digits", code=2).stderr
        (photos / "07.png").write_bytes((photos / "08.png").read_bytes()[:200])
        assert "07.png' cannot be read" in evaluate(photos, "--reference", "digits", code=2).stderr

    @pytest.mark.parametrize(
        ("arrays", "says"),
        [
            ({"mu": np.zeros(8)}, "has no array of pictures (N, H, W, 3) named arr_0 or images. It has mu (8,)"),
            ({"a": np.zeros((4, 8, 8, 3), np.uint8), "b": np.zeros((4, 8, 8, 3), np.uint8)}, "has no array of pictures"),
            ({"images": np.zeros((4, 8, 8, 3), np.int32)}, "pictures of int32"),
            ({"images": np.full((4, 8, 8, 3), 200.0)}, "numbers from 200 to 200"),
            ({"images": np.full((4, 8, 8, 3), np.nan)}, "numbers from -inf to inf"),
            ({"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "4 pictures, but not as many labels"),
            (
                {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros((4, 1), int)},
                "texts were expected, not (4, 1) of int64",
            ),
            (
                {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.full(4, np.nan)},
                "texts were expected, not (4,) of float64",
            ),
            ({"images": np.zeros((4, 8, 8, 3), np.uint8), "captions": NO_TEXT.repeat(4)}, "a number that is no character"),
            ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "has no array of pictures"),
            ({"images": np.array([None] * 4)}, "pickled objects"),
        ],
    )
    def test_npz_without_pictures(self, arrays: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", **arrays)
        assert says in evaluate(tmp_path / "x.npz", "--reference", "digits", code=2).stderr

    def test_npz_that_is_none(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "x.npz").write_bytes(b"PK nonsense")
        assert "cannot be read as .npz" in evaluate(photos, "--reference", tmp_path / "x.npz", code=2).stderr


class TestCache:
    def test_the_reference_is_kept_and_the_sample_is_not(self, photos: Path, cache: Path) -> None:
        line = (photos, "--reference", "digits", "--metrics", "fid", "--bootstrap", 0)
        first = document(*line)["metrics"]
        files = {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")}
        assert len(files) == 16  # 1,000 in pieces of 64
        assert document(*line)["metrics"] == first
        assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.safetensors")} == files
        damaged = next(iter(files))
        damaged.write_bytes(damaged.read_bytes()[:-3])
        assert document(*line)["metrics"] == first
        assert damaged.stat().st_mtime_ns != files[damaged]

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from genkit.files import cache_folder

        monkeypatch.delenv("GENKIT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        if os.name != "nt":
            assert cache_folder() == Path("/somewhere/genkit")


class TestSampling:
    @pytest.fixture
    def line(self, tiny_folder: Path, photos: Path, tmp_path: Path) -> list[object]:
        model = ["--model", tiny_folder, "--prompt", "a red seven", "--prompt", "a two", "--steps", 2]
        return [tmp_path / "out", *model, "--count", 8, "--reference", photos, "--bootstrap", 0]

    def test_it_samples_and_measures(self, line: list[object], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "out" / "of-others.png")
        found = document(*line, "--seed", 40)
        assert found["images"] == 8
        assert {name: row["count"] for name, row in found["metrics"].items() if name in ("digit", "ink")} == {"digit": 8, "ink": 4}
        from genkit.recipe import read_recipe

        recipes = [read_recipe(file) for file in (tmp_path / "out").glob("*-s*.png")]
        assert sorted((recipe.seed, recipe.prompt) for recipe in recipes) == [
            (40 + i, ["a red seven", "a two"][i % 2]) for i in range(8)
        ]

    def test_resume_keeps_what_is_there(self, line: list[object], tmp_path: Path) -> None:
        first = document(*line)["metrics"]
        files = sorted((tmp_path / "out").glob("*.png"))
        files[3].unlink()
        kept = {file: file.stat().st_mtime_ns for file in files if file != files[3]}
        assert document(*line, "--resume")["metrics"] == first
        assert files[3].exists()
        assert {file: file.stat().st_mtime_ns for file in kept} == kept

    def test_a_plan_is_only_a_plan(self, line: list[object], tmp_path: Path) -> None:
        result = evaluate(*line, "--dry-run")
        assert "Would sample 8 images into" in result.stdout
        assert not (tmp_path / "out").exists()


def test_help_has_an_example() -> None:
    text = evaluate("--help").stdout
    assert "genkit eval out --reference digits" in text
    assert "suite" in text


def test_two_processes_find_what_one_finds(photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def line(name: str) -> list[str]:
        model = ["--model", str(tiny_folder), "--prompt", "a seven", "--steps", "2", "--count", "70", "--device", "cpu"]
        return ["eval", str(tmp_path / name), *model, "--reference", "digits", "--bootstrap", "20", "--json"]

    code, stdout, stderr = two_processes(line("two"), ACCELERATE_USE_CPU="1", GENKIT_CACHE=str(tmp_path / "other"))
    assert code == 0, stderr
    one, two = document(*line("one")[1:-1]), json.loads(stdout)
    assert two["images"] == 70
    assert list(two["metrics"]) == [*DISTANCES, "digit"]
    for name, row in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(row, rel=0.02, abs=0.02), name
