"""The command itself: what it imports, its help, version, zoo and doctor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import genkit
from genkit import zoo
from genkit.cli import doctor
from genkit.cli.app import app
from genkit.cli.common import resolve_device
from genkit.console import console

COMMANDS = [
    ["sample"],
    ["classify"],
    ["zoo"],
    ["zoo", "list"],
    ["zoo", "show"],
    ["zoo", "train"],
    ["doctor"],
    ["eval"],
    ["eval", "suite"],
]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")


def test_nothing_heavy_is_imported_before_it_is_needed(tmp_path: Path) -> None:
    """Help, listings and plans work without torch, diffusers and transformers; one process checks them all."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    lines = [
        ["--help"],
        ["--version"],
        ["zoo", "list"],
        ["sample", "--help"],
        ["classify", "--help"],
        ["sample", "a", "--model", str(tmp_path / "tiny"), "--guidance", "classifier:label=1", "--sweep", "cfg=1,2", "--dry-run"],
        ["zoo", "train", "digits", "--out", "x", "--dry-run"],
        ["eval", "--help"],
        ["eval", str(tmp_path), "--reference", "digits", "--dry-run"],
        ["eval", str(tmp_path / "x"), "--model", str(tmp_path / "tiny"), "--prompt", "a", "--count", "3", "--dry-run"],
    ]
    code = f"""
import sys
import genkit, genkit.recipe, genkit.gallery
from genkit.cli.app import app
from genkit.guidance import registry
for line in {lines!r}:
    code = app(line, standalone_mode=False)
    assert not code, (line, code)
heavy = {{"torch", "diffusers", "transformers", "accelerate"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"genkit {genkit.__version__}\n"
    module = subprocess.run([sys.executable, "-m", "genkit", "--version"], capture_output=True, text=True)
    assert module.stdout == result.stdout


def test_the_package_exports_lazily() -> None:
    assert genkit.Recipe(prompt="a").prompt == "a"
    assert {"Level", "Prediction", "Recipe"} <= set(dir(genkit))
    with pytest.raises(AttributeError, match="nonsense"):
        genkit.nonsense  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_the_common_options_and_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    if command == ["zoo"]:
        return
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert "Example" in text
    for option in ("--json", "--quiet", "--debug"):
        assert option in text


@pytest.mark.parametrize(
    ("line", "says"),
    [(["sampel"], "sample"), (["sample", "--sedes", "1"], "--seeds"), (["zoo", "lost"], "list"), (["zoo", "show"], "NAME")],
)
def test_usage_errors_are_2_and_help(line: list[str], says: str) -> None:
    result = run(*line)
    assert result.exit_code == 2
    assert says in result.stderr


class TestZoo:
    def test_list_and_show(self, fake_zoo: Path) -> None:
        result = run("zoo", "list")
        assert result.exit_code == 0
        assert "digits" in result.stdout
        assert "accuracy 0.99" in result.stdout
        document = json.loads(run("zoo", "list", "--json").stdout)
        assert [model["name"] for model in document["models"]] == ["digits"]
        assert document["models"][0]["bytes"] > 0
        assert "MNIST [real]" in run("zoo", "show", "digits").stdout
        assert json.loads(run("zoo", "show", "digits", "--json").stdout)["data"] == "MNIST [real]"
        assert run("zoo", "show", "digits", "--quiet").stdout == ""

    @pytest.mark.parametrize(
        ("name", "says"), [("digts", "Did you mean 'digits'"), ("digits-judge", "genkit zoo train digits-judge")]
    )
    def test_show_of_what_is_not_there(self, fake_zoo: Path, name: str, says: str) -> None:
        result = run("zoo", "show", name)
        assert result.exit_code == 2
        assert says in result.stderr
        assert json.loads(run("zoo", "show", name, "--json").stdout)["error"] in result.stderr

    def test_an_empty_zoo_says_what_to_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zoo, "ROOT", tmp_path / "none")
        assert "genkit zoo train" in run("zoo", "list").stdout

    def test_train_calls_the_script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from genkit.zoo.training import (
            autoencoder,
            classifier,
            digits,
            discriminator,
            furniture,
            layout_prior,
            noisy_classifier,
            scenes,
            turbo,
        )

        calls = []
        monkeypatch.setattr(scenes, "train", lambda *a, **k: calls.append(("scenes", a, k)))
        monkeypatch.setattr(layout_prior, "train", lambda *a, **k: calls.append(("layout_prior", a, k)))
        monkeypatch.setattr(digits, "train", lambda *a, **k: calls.append(("digits", a, k)))
        monkeypatch.setattr(autoencoder, "train", lambda *a, **k: calls.append(("autoencoder", a, k)))
        monkeypatch.setattr(classifier, "train", lambda *a, **k: calls.append(("classifier", a, k)))
        monkeypatch.setattr(noisy_classifier, "train", lambda *a, **k: calls.append(("noisy_classifier", a, k)))
        monkeypatch.setattr(discriminator, "train", lambda *a, **k: calls.append(("discriminator", a, k)))
        monkeypatch.setattr(turbo, "train", lambda *a, **k: calls.append(("turbo", a, k)))
        monkeypatch.setattr(furniture, "train", lambda *a, **k: calls.append(("furniture", a, k)))
        for name in zoo.TRAINABLE:
            assert run("zoo", "train", name, "--out", tmp_path / name, "--steps", 3, "--resume", "--device", "cpu").exit_code == 0
        arguments = {"steps": 3, "resume": True, "device": "cpu"}
        assert calls == [
            ("autoencoder", (tmp_path / "autoencoder",), arguments),
            ("digits", (tmp_path / "digits",), arguments),
            ("classifier", ("digits-classifier", tmp_path / "digits-classifier"), arguments),
            ("noisy_classifier", (tmp_path / "digits-noisy-classifier",), arguments),
            ("discriminator", (tmp_path / "digits-discriminator",), arguments),
            ("turbo", (tmp_path / "digits-turbo",), arguments),
            ("scenes", (tmp_path / "scenes",), arguments),
            ("layout_prior", (tmp_path / "scenes-prior",), arguments),
            ("furniture", (tmp_path / "furniture",), arguments),
            ("classifier", ("digits-judge", tmp_path / "digits-judge"), arguments),
        ]

    def test_train_interrupted_and_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from genkit.zoo.training import digits

        def interrupt(*a: object, **k: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(digits, "train", interrupt)
        result = run("zoo", "train", "digits", "--out", tmp_path)
        assert result.exit_code == 130
        assert "--resume" in result.stderr
        assert "Did you mean 'digits'" in run("zoo", "train", "digit", "--out", tmp_path).stderr
        (tmp_path / "file").write_text("")
        for line in (["digits", "--out", tmp_path / "file"], ["digits", "--out", tmp_path, "--device", "gpu"]):
            assert run("zoo", "train", *line).exit_code == 2


@pytest.fixture
def fake_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo with one model that has a card and no weights."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "card.json").write_text(json.dumps({"what": "digits", "data": "MNIST [real]", "quality": {"accuracy": 0.99}}))
    monkeypatch.setattr(zoo, "ROOT", tmp_path)
    return folder


class TestDoctor:
    def test_this_machine_is_usable(self) -> None:
        result = run("doctor", "--json")
        document = json.loads(result.stdout)
        assert result.exit_code == (0 if document["usable"] else 1)
        found = {check["name"]: check["status"] for check in document["checks"]}
        assert {"python", "torch", "diffusers", "devices", "fused attention", "xformers", "triton", "mlxtend", "timm"} <= set(found)
        assert found["torch"] == found["fused attention"] == "ok"

    @pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
    def test_only_what_is_needed_breaks_it(self, monkeypatch: pytest.MonkeyPatch, needed: bool, code: int) -> None:
        def broken() -> str:
            raise RuntimeError("undefined symbol:\n _ZN3")

        monkeypatch.setattr(doctor, "run_checks", lambda: iter([doctor._attempt("thing", broken, needed=needed)]))
        result = run("doctor")
        assert result.exit_code == code
        assert "RuntimeError: undefined symbol: _ZN3" in result.stdout
        assert ("needs what is broken here: thing" in result.stderr) == needed

    def test_a_version_out_of_range_is_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib import metadata

        monkeypatch.setattr(
            metadata, "requires", lambda name: ["typer>=999", "not-there-at-all", "pytest ; extra == 'test'", "rich"]
        )
        found = {check.name: check for check in doctor._requirements()}
        assert found["typer"].status == found["not-there-at-all"].status == "broken"
        assert "pip install 'typer>=999'" in found["typer"].detail
        assert found["rich"].status == "ok"
        assert "pytest" not in found

    def test_a_damaged_model_is_broken(self, fake_zoo: Path) -> None:
        (fake_zoo / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
        found = {check.name: check for check in doctor._models()}
        assert found["model digits"].status == "broken"
        assert "'unet' is missing" in found["model digits"].detail
        assert found["model digits-judge"].status == "missing"


def test_defects_are_told_from_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def raiser(error: Exception) -> Callable[[], None]:
        def checks() -> None:
            raise error

        return checks

    monkeypatch.setattr(doctor, "run_checks", raiser(RuntimeError("CUDA out of memory\x1b[31m")))
    result = run("doctor")
    assert result.exit_code == 1
    assert "lower --batch" in result.stderr
    assert "\x1b" not in result.stderr
    monkeypatch.setattr(doctor, "run_checks", raiser(RuntimeError("odd")))
    assert "--debug" in run("doctor").stderr
    assert isinstance(run("doctor", "--debug").exception, RuntimeError)
    monkeypatch.setattr(doctor, "run_checks", raiser(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert run("doctor", "--quiet").exit_code == 130
    assert not console.quiet


def test_devices() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cpu", "cuda", "xpu", "mps")
    with pytest.raises(ValueError, match=r"Device 'cuda:999' is not usable here. Usable: .*cpu"):
        resolve_device("cuda:999")
    with pytest.raises(ValueError, match="Unknown device 'gpu'"):
        resolve_device("gpu")
