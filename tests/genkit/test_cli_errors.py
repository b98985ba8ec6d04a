"""Bad input to `genkit sample`: one or two sentences with the wrong value, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.images import save_png
from genkit.recipe import Recipe


def refused(*arguments: object) -> str:
    """The message of a command that must be refused."""
    result = CliRunner().invoke(app, ["sample", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.index("Error: ") :]
    assert len(message) < 800
    return message


@pytest.fixture
def line(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    """A good command line, to spoil."""
    return ("a red seven", "--model", tiny_folder, "--steps", 1, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--sampler", "eular"], "Unknown sampler 'eular'. Did you mean 'euler'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--device", "cuda:77"], "'cuda:77' is not usable here"),
        (["--dtype", "float33"], "Unknown dtype 'float33'. Did you mean 'float32'"),
        (["--guidance", "clasifier:label=1"], "Unknown guidance 'clasifier'. Did you mean 'classifier'"),
        (["--guidance", "classifier:lable=1"], "Unknown classifier parameter 'lable'. Did you mean 'label'"),
        (["--guidance", "classifier:label"], "'label' is not key=value"),
        (["--guidance", "classifier:scale=1"], "needs label"),
        (["--sweep", "cgf=1,2"], "Unknown sweep key 'cgf'. Did you mean 'cfg'"),
        (["--seeds", "5-1"], "runs backwards"),
        (["--steps", "0"], "steps must be a whole number from 1"),
        (["--cfg", "nan"], "cfg must be a number"),
        (["--eta", "2"], "eta must be a number from 0 to 1; got 2.0"),
        (["--size", "16"], None),
        (["--size", "17x16"], "=17 does not fit the model"),
        (["--size", "big"], "'big' is not WIDTHxHEIGHT"),
        (["--labels", "1"], "Both prompts and --labels"),
        (["--negative", "\x1b[31m"], "control characters"),
    ],
)
def test_wrong_values(line: tuple[object, ...], option: list[str], says: str | None) -> None:
    if says is None:  # the good counterpart
        assert CliRunner().invoke(app, ["sample", *map(str, line), *option]).exit_code == 0
    else:
        assert says in refused(*line, *option)


def test_no_prompt(tiny_folder: Path) -> None:
    assert "There is no prompt" in refused("--model", tiny_folder)


def test_prompts_files(line: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n# only a comment\n")
    (tmp_path / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    for name, says in (
        ("missing", "cannot be read (No such file"),
        ("empty", "holds no prompt"),
        ("latin", "is not UTF-8 (byte 3)"),
    ):
        message = refused("--prompts-file", tmp_path / name, *line[1:])
        assert says in message
        assert name in message


def test_output_folders(line: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "is or lies below a file" in refused(*line[:-1], out)
    assert (tmp_path / "file").read_text() == "keep me"
    if Path("/proc/self").exists():
        assert "cannot be written" in refused(*line[:-1], "/proc/self")


class TestModels:
    @pytest.fixture
    def folder(self, tiny_folder: Path, tmp_path: Path) -> Path:
        """A copy of the model, to damage."""
        return shutil.copytree(tiny_folder, tmp_path / "model")

    def refused(self, folder: object, *more: object) -> str:
        return refused("a", "--model", folder, "--steps", 1, "--out", "never", *more)

    def test_unknown(self, tmp_path: Path) -> None:
        assert "Unknown model 'dgits'" in self.refused("dgits")
        assert "There is no folder 'nowhere'" in self.refused("./nowhere")
        (tmp_path / "empty").mkdir()
        assert "is no model folder" in self.refused(tmp_path / "empty")
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert "is a file" in self.refused(tmp_path / "model.safetensors")

    def test_on_the_hub_without_a_network(self) -> None:
        assert "'nobody/nothing' is no folder here, and the Hub does not give it" in self.refused("nobody/nothing")

    def test_truncated(self, folder: Path) -> None:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        assert "truncated or not safetensors" in self.refused(folder)

    def test_not_safetensors(self, folder: Path) -> None:
        weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(b"hello, this is no checkpoint")
        assert str(weights) in self.refused(folder)

    def test_wrong_shapes(self, folder: Path) -> None:
        config = folder / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 16}))
        assert "do not fit its configuration" in self.refused(folder)

    def test_a_pickle_must_be_allowed(self, folder: Path, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
        message = self.refused(folder)
        assert "are a pickle" in message
        assert "--allow-pickle" in message
        result = CliRunner().invoke(
            app, ["sample", "a", "--model", str(folder), "--steps", "1", "--out", str(tmp_path / "o"), "--allow-pickle"]
        )
        assert result.exit_code == 0, result.output

    def test_a_hostile_pickle_does_not_run(self, folder: Path, tmp_path: Path) -> None:
        import os
        import pickle

        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "pwned"),)

        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        weights.with_suffix(".bin").write_bytes(pickle.dumps({"conv_in.weight": Evil()}, protocol=2))
        self.refused(folder)
        self.refused(folder, "--allow-pickle")
        assert not (tmp_path / "pwned").exists()


class TestFrom:
    """A recipe in a picture may come from anyone."""

    @pytest.fixture
    def picture(self, tmp_path: Path):
        def make(text: str | None) -> Path:
            save_png(Image.new("RGB", (8, 8)), tmp_path / "p.png", None if text is None else {"genkit": text})
            return tmp_path / "p.png"

        return make

    def test_no_or_malformed_recipes(self, picture, tmp_path: Path) -> None:
        assert "carries no recipe" in refused("--from", picture(None))
        for text in ("{", "[]", '{"steps": "many"}', '{"prompt": "\\u001b[31m"}', "[" * 10_000, '{"out": "/etc"}'):
            assert "p.png' cannot be used" in refused("--from", picture(text))
        assert "There is no file" in refused("--from", tmp_path / "nothing.png")
        (tmp_path / "text.png").write_text("no picture")
        assert "is not a PNG" in refused("--from", tmp_path / "text.png")

    def test_models_and_code_must_be_named_by_the_user(self, picture, tiny_folder: Path, tmp_path: Path) -> None:
        strange = picture(Recipe(model=str(tiny_folder), prompt="a", steps=1).to_json())
        out = ("--out", tmp_path / "out")
        assert "is not embedded. If you trust it, name it" in refused("--from", strange, *out)
        for spec in ("os:system", "classifier:label=1,model=/tmp/x"):
            hostile = picture(Recipe(model=str(tiny_folder), prompt="a", steps=1, guidance=(spec,)).to_json())
            assert "--guidance SPEC" in refused("--from", hostile, "--model", tiny_folder, *out)
        assert not (tmp_path / "out").exists()

    def test_files_stay_in_out(self, picture, tiny_folder: Path, tmp_path: Path) -> None:
        hostile = picture(Recipe(model="digits", prompt="../../../escape/..", steps=1).to_json())
        out = tmp_path / "a" / "out"
        result = CliRunner().invoke(app, ["sample", "--from", str(hostile), "--model", str(tiny_folder), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert {p for p in tmp_path.rglob("*") if p.is_file()} == {hostile, *out.iterdir()}


def test_errors_are_json_too(line: tuple[object, ...]) -> None:
    result = CliRunner().invoke(app, ["sample", *map(str, line), "--sampler", "x", "--json"])
    assert result.exit_code == 2
    assert "Unknown sampler 'x'" in json.loads(result.stdout)["error"]


def test_debug_shows_the_traceback(line: tuple[object, ...]) -> None:
    result = CliRunner().invoke(app, ["sample", *map(str, line), "--sampler", "x", "--debug"])
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2")])
def test_ranks_that_make_no_sense(line: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert f"RANK={rank}" in refused(*line).replace("'", "")
