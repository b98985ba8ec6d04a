"""`genkit sample` on a tiny random model: what it writes, and that a recipe alone decides an image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit import samplers, zoo
from genkit.cli.app import app
from genkit.data.pictures import find_pictures
from genkit.guidance import Guidance, State, registry
from genkit.images import read_text
from genkit.prediction import Prediction
from genkit.recipe import Recipe, read_recipe
from genkit.runner import load, run, run_batch

PROMPT = "a red seven on yellow paper"


def sample(*arguments: object, code: int = 0):
    """Run `genkit sample` in this process; every test says which exit code it expects."""
    result = CliRunner().invoke(app, ["sample", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def assert_same_images(a: Path, b: Path) -> None:
    """The same names and pixels. Batches of other shapes round otherwise, which shows as one grey level here and there."""
    names = sorted(p.name for p in a.glob("*.png"))
    assert names == sorted(p.name for p in b.glob("*.png"))
    for name in names:
        difference = np.abs(pixels(a / name) - pixels(b / name))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder of two prompts x three seeds, and what --json said."""
    out = tmp_path_factory.mktemp("made")
    result = sample(PROMPT, "", "--model", tiny_folder, "--seeds", "0-2", "--steps", 3, "--out", out, "--json")
    return out, json.loads(result.stdout)


def test_writes_an_image_and_a_sidecar_for_each(made: tuple[Path, dict], tiny_folder: Path) -> None:
    out, document = made
    assert len(document["images"]) == 6
    assert document["failed"] == []
    assert len(list(out.iterdir())) == 13
    assert document["grid"] == str(out / "grid.png")
    for entry in document["images"]:
        path = Path(entry["file"])
        recipe = Recipe(model=str(tiny_folder), prompt=entry["prompt"], seed=entry["seed"], steps=3)
        assert path.stem == recipe.name
        assert read_recipe(path) == recipe
        assert json.loads(read_text(path)["genkit"])["versions"]["genkit"]
        assert f"Seed: {entry['seed']}, Size: 16x16" in read_text(path)["parameters"]
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert Recipe.from_json(json.dumps(sidecar["recipe"])) == recipe
        assert sidecar["hash"] == recipe.hash
        assert sidecar["scheduler"]["class"] == "PNDMScheduler"
        assert sidecar["scheduler"]["config"]["beta_schedule"] == "scaled_linear"
        assert {"versions", "device", "dtype", "seconds"} <= set(sidecar)
    assert len({pixels(entry["file"]).tobytes() for entry in document["images"]}) == 6


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_and_order_do_not_change_an_image(made: tuple[Path, dict], tiny_folder: Path, tmp_path: Path, batch: int) -> None:
    sample("", PROMPT, "--model", tiny_folder, "--seeds", "2,0,1", "--steps", 3, "--out", tmp_path, "--batch", batch, "--no-grid")
    (made[0] / "grid.png").unlink(missing_ok=True)
    assert_same_images(made[0], tmp_path)


def test_python_gives_the_same_image(made: tuple[Path, dict], tiny_folder: Path) -> None:
    path = Path(made[1]["images"][4]["file"])
    image = read_recipe(path).run(load(str(tiny_folder)))
    assert np.abs(np.asarray(image).astype(int) - pixels(path)).max() <= 1


def test_from_repeats_an_image_and_flags_override(made: tuple[Path, dict], tiny_folder: Path, tmp_path: Path) -> None:
    source = Path(made[1]["images"][1]["file"])
    sample("--from", source, "--model", tiny_folder, "--out", tmp_path / "same")
    assert np.abs(pixels(tmp_path / "same" / source.name) - pixels(source)).max() <= 1
    result = sample("--from", source, "--model", tiny_folder, "--seeds", "5-6", "--cfg", 1, "--out", tmp_path / "other", "--json")
    recipes = [entry["recipe"] for entry in json.loads(result.stdout)["images"]]
    assert [(r["seed"], r["cfg"], r["steps"], r["prompt"]) for r in recipes] == [(5, 1.0, 3, PROMPT), (6, 1.0, 3, PROMPT)]


def test_resume_makes_only_what_is_missing(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = (PROMPT, "--model", tiny_folder, "--seeds", "0-3", "--steps", 2, "--out", tmp_path, "--json")
    first = json.loads(sample(*arguments).stdout)
    files = [Path(entry["file"]) for entry in first["images"]]
    before = {path: pixels(path) for path in files}
    files[0].unlink()
    files[1].with_suffix(".json").write_text("{")
    kept = [path.stat().st_mtime_ns for path in files[2:]]
    second = json.loads(sample(*arguments, "--resume").stdout)
    assert [entry["resumed"] for entry in second["images"]] == [False, False, True, True]
    assert [path.stat().st_mtime_ns for path in files[2:]] == kept
    for path in files:
        assert np.abs(pixels(path) - before[path]).max() <= 1
    third = sample(*arguments[:-1], "--resume")
    assert "4 were there already" in third.stdout


def test_shards_hold_the_same_images(made: tuple[Path, dict], tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("genkit.cli.job.SHEET_MOST", 5)
    arguments = (PROMPT, "", "--model", tiny_folder, "--seeds", "0-2", "--steps", 3, "--out", tmp_path, "--shards", "--json")
    result = sample(*arguments)
    assert "would show 6 images" in result.stderr
    document = json.loads(result.stdout)
    assert document["grid"] is None
    for there, here in zip(made[1]["images"], document["images"], strict=True):
        path = Path(here["file"])
        assert path.name == Path(there["file"]).name
        assert path.parent == tmp_path / read_recipe(path).hash[:2]
        assert np.abs(pixels(path) - pixels(there["file"])).max() <= 1
    assert all(entry["resumed"] for entry in json.loads(sample(*arguments, "--resume").stdout)["images"])
    assert len(find_pictures([str(tmp_path)])) == 6  # what reads folders reads them all


def test_sweeps_span_a_grid(tiny_folder: Path, tmp_path: Path) -> None:
    line = (
        PROMPT,
        "--model",
        tiny_folder,
        "--steps",
        2,
        "--out",
        tmp_path,
        "--sweep",
        "cfg=1,4",
        "--sweep",
        "sampler=ddim,euler,heun",
    )
    document = json.loads(sample(*line, "--json").stdout)
    recipes = [(entry["recipe"]["cfg"], entry["recipe"]["sampler"]) for entry in document["images"]]
    assert recipes == [(cfg, sampler) for cfg in (1.0, 4.0) for sampler in ("ddim", "euler", "heun")]
    classes = {
        json.loads(Path(entry["file"]).with_suffix(".json").read_text())["scheduler"]["class"] for entry in document["images"]
    }
    assert classes == {"DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"}
    assert Image.open(document["grid"]).height > 2 * 96


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_samples_and_leaves_the_model_as_it_was(pipe, name: str) -> None:
    own = pipe.scheduler
    recipes = [Recipe(prompt=PROMPT, seed=seed, steps=3, sampler=name) for seed in (0, 1)]
    together = [np.asarray(outcome.image).astype(int) for outcome in run(pipe, recipes)]
    alone = [np.asarray(outcome.image).astype(int) for outcome in run(pipe, recipes, batch_size=1)]
    assert np.abs(np.array(together) - np.array(alone)).max() <= 1
    assert pipe.scheduler is own


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path):
    return load(str(tiny_folder))


def test_settings_reach_the_pipeline(pipe) -> None:
    base = Recipe(prompt=PROMPT, steps=2, seed=1)
    image = run_batch(pipe, [Recipe(prompt=PROMPT, steps=2, seed=1, width=32, height=16)])[0]
    assert image.size == (32, 16)
    plain = np.asarray(base.run(pipe))
    for change in ({"negative": "a blue cat"}, {"cfg": 9.0}, {"sampler": "ddim", "eta": 1.0}):
        assert not np.array_equal(plain, np.asarray(Recipe(**{"prompt": PROMPT, "steps": 2, "seed": 1, **change}).run(pipe)))
    with pytest.raises(ValueError, match="differ in seed, prompt and label only"):
        run_batch(pipe, [base, Recipe(prompt=PROMPT, steps=3)])


def test_class_conditional_and_unconditional_models(tmp_path: Path) -> None:
    from tests import tiny

    for family in ("dit", "ddpm"):
        tiny.pipeline(family).save_pretrained(tmp_path / family)
    arguments = ("--steps", 2, "--seeds", "0-1", "--json", "--out", tmp_path / "out")
    labelled = json.loads(sample("--model", tmp_path / "dit", "--labels", "0,1", *arguments).stdout)
    assert [entry["recipe"]["label"] for entry in labelled["images"]] == [0, 0, 1, 1]
    assert Path(labelled["images"][0]["file"]).name.startswith("class-0-s0000-")
    free = json.loads(sample("--model", tmp_path / "ddpm", *arguments).stdout)
    assert len(free["images"]) == 2
    assert "prompt" in sample(PROMPT, "--model", tmp_path / "ddpm", *arguments, code=2).stderr
    assert "labels" in sample("--model", tmp_path / "dit", "--labels", "0", PROMPT, *arguments, code=2).stderr


class Push(Guidance):
    """Pushes along the sample; with `poison`, the sample of that seed becomes NaN."""

    name = "push"

    def __init__(self, scale: float = 0.0, poison: int | None = None) -> None:
        self.scale, self.poison = scale, poison

    def active(self, state: State) -> bool:
        return self.scale != 0 or self.poison is not None

    def shift(self, state: State, prediction: Prediction) -> torch.Tensor:
        shift = self.scale * state.x
        if self.poison in (state.seeds or []):
            shift[state.seeds.index(self.poison)] = float("nan")  # type: ignore[union-attr]
        return shift


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.Entry("pushes", {"scale": "", "poison": ""}, lambda pipe, **values: Push(**values))
    monkeypatch.setitem(registry._ENTRIES, "push", entry)


@pytest.mark.usefixtures("push")
class TestGuidance:
    def test_weights_can_be_swept_and_specs_add_up(self, tiny_folder: Path, tmp_path: Path) -> None:
        line = (PROMPT, "--model", tiny_folder, "--steps", 2, "--json")
        document = json.loads(sample(*line, "--guidance", "push", "--sweep", "push.scale=0,1,2", "--out", tmp_path / "a").stdout)
        zero, one, two = (pixels(entry["file"]) for entry in document["images"])
        assert not np.array_equal(zero, two)
        both = json.loads(sample(*line, "--guidance", "push:scale=1", "--guidance", "push:scale=0", "--out", tmp_path / "b").stdout)
        assert np.abs(pixels(both["images"][0]["file"]) - one).max() <= 1
        plain = json.loads(sample(*line, "--out", tmp_path / "c").stdout)
        assert np.array_equal(pixels(plain["images"][0]["file"]), zero)

    def test_one_bad_image_costs_no_other(self, tiny_folder: Path, tmp_path: Path) -> None:
        line = (PROMPT, "--model", tiny_folder, "--steps", 2, "--seeds", "0-3", "--guidance", "push:poison=2", "--out", tmp_path)
        result = sample(*line, "--json", code=3)
        document = json.loads(result.stdout)
        assert [entry["seed"] for entry in document["images"]] == [0, 1, 3]
        assert "guidance 'push' gave NaN" in document["failed"][0]["error"]
        assert "guidance 'push' gave NaN" in result.stderr
        assert len(list(tmp_path.glob("*.json"))) == 3
        assert "3 of 4 images" in sample(*line, code=3).stdout

    def test_nothing_but_bad_images_is_an_error(self, tiny_folder: Path, tmp_path: Path) -> None:
        line = (PROMPT, "--model", tiny_folder, "--steps", 2, "--guidance", "push:poison=0", "--out", tmp_path, "--grid")
        assert "0 of 1 images" in sample(*line, code=2).stdout


class TestFunctions:
    """A function of the user's as guidance, in this process' current folder."""

    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "guides_of_the_user", raising=False)
        lines = ["def redness(images):", "    return 100 * images[:, 0].flatten(1).mean(1)"]
        lines += ["def broken(images):", "    raise RuntimeError('nothing here')"]
        (tmp_path / "guides_of_the_user.py").write_text("\n".join(lines))

    def test_it_steers_and_can_be_swept(self, tiny_folder: Path) -> None:
        line = (PROMPT, "--model", tiny_folder, "--steps", 2, "--guidance", "guides_of_the_user:redness:recurrence=2", "--json")
        document = json.loads(sample(*line, "--sweep", "redness.scale=0,1,2").stdout)
        red = [pixels(entry["file"])[..., 0].mean() for entry in document["images"]]
        assert red[0] < red[1] < red[2]
        plain = json.loads(sample(*line[:5], "--json", "--out", "plain").stdout)["images"][0]["file"]
        assert np.array_equal(pixels(plain), pixels(document["images"][0]["file"]))

    def test_a_recipe_with_a_function_must_be_told_again(self, tiny_folder: Path) -> None:
        spec = "guides_of_the_user.py:redness"
        line = ("--model", tiny_folder, "--steps", 1, "--json")
        source = json.loads(sample(PROMPT, *line, "--guidance", spec).stdout)["images"][0]["file"]
        Path("guides_of_the_user.py").write_text("open('it-ran', 'w')")
        result = sample("--from", source, "--model", tiny_folder, code=2)
        assert "does not know by that name" in result.stderr
        assert not Path("it-ran").exists()

    def test_errors_name_the_function_and_only_debug_shows_more(self, tiny_folder: Path) -> None:
        line = (PROMPT, "--model", tiny_folder, "--steps", 1, "--guidance", "guides_of_the_user:broken")
        result = sample(*line, code=2)
        assert "Guidance 'broken' failed at evaluation 1 of" in result.stderr
        assert "RuntimeError: nothing here" in result.stderr
        assert "Traceback" not in result.output
        failed = CliRunner().invoke(app, ["sample", *map(str, line), "--debug"], prog_name="genkit")
        assert isinstance(failed.exception.__cause__, RuntimeError)

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ("guides_of_the_user:blue", "Known: redness, broken"),
            ("no_such_module:f", "no module 'no_such_module'"),
            ("x.py:f", "no file"),
        ],
    )
    def test_what_is_missing_is_said_before_anything_is_loaded(self, tiny_folder: Path, spec: str, says: str) -> None:
        line = (PROMPT, "--model", tiny_folder, "--guidance", spec, "--dry-run")
        assert says in sample(*line, code=2).stderr


def test_dry_run_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    line = (PROMPT, "--model", tiny_folder, "--seeds", "0-1", "--out", tmp_path / "out", "--dry-run")
    assert "Would make 2 images" in sample(*line).stdout
    document = json.loads(sample(*line, "--json").stdout)
    assert document["count"] == 2
    assert document["images"][1]["recipe"]["seed"] == 1
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_a_file_too(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# comment\n\na seven\r\n  a three  \n", encoding="utf-8")
    line = ("a cat", "--prompts-file", file, "--model", tiny_folder, "--dry-run", "--json")
    document = json.loads(sample(*line).stdout)
    assert [entry["recipe"]["prompt"] for entry in document["images"]] == ["a cat", "a seven", "a three"]


def test_quiet_is_quiet(tiny_folder: Path, tmp_path: Path) -> None:
    result = sample(PROMPT, "--model", tiny_folder, "--steps", 1, "--out", tmp_path, "--quiet", "--dtype", "bfloat16")
    assert result.stdout == ""
    assert "sampling" not in result.stderr


@pytest.mark.skipif("digits" not in zoo.names(), reason="the embedded `digits` is not in this checkout: genkit zoo train digits")
def test_the_embedded_model_samples(tmp_path: Path) -> None:
    result = sample(PROMPT, "--seeds", "0-1", "--steps", 5, "--out", tmp_path, "--json")
    document = json.loads(result.stdout)
    source = document["images"][0]["file"]
    assert Image.open(source).size == (32, 32)
    sample("--from", source, "--out", tmp_path / "again")
    assert np.abs(pixels(tmp_path / "again" / Path(source).name) - pixels(source)).max() <= 1
