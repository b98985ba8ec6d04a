"""`genkit train token` and `genkit sample --token`, on the tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.cli.train_token import parse_classes
from genkit.recipe import Recipe, read_recipe
from genkit.runner import load, run_batch
from genkit.tokens import read_token


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


QUICK = ["--prompt", "a red {token}", "--guide-size", 32, "--updates", 2, "--steps", 2, "--batch", 2]


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two tokens, and what --json said."""
    out = tmp_path_factory.mktemp("tokens")
    result = genkit("train", "token", "--model", tiny_folder, "--classes", "my-seven=seven,two", "--out", out, *QUICK, "--json")
    return out, json.loads(result.stdout)


def test_writes_tokens_log_checkpoint_and_pictures(trained: tuple[Path, dict], tiny_folder: Path) -> None:
    out, document = trained
    names = {"my-seven.safetensors", "two.safetensors", "tokens.png", "log.jsonl", "checkpoint.pt"}
    assert {path.name for path in out.iterdir()} == names
    assert [(row["token"], row["class"], row["updates"]) for row in document["tokens"]] == [
        ("<my-seven>", "seven", 2),
        ("<two>", "two", 2),
    ]
    file = read_token(out / "my-seven.safetensors")
    assert file.token == "<my-seven>"
    assert file.shapes == {"<my-seven>": (1, 8)}
    assert file.metadata["model"] == str(tiny_folder)
    assert file.metadata["class"] == "seven"
    assert file.metadata["guide"]["name"] == "digits-classifier"
    assert 0 <= file.metadata["accuracy"] <= 1


def test_resume_goes_on_to_more_updates(trained: tuple[Path, dict], tiny_folder: Path) -> None:
    out, _ = trained
    arguments = ["train", "token", "--model", tiny_folder, "--classes", "my-seven=seven,two", "--out", out, *QUICK, "--resume"]
    result = genkit(*arguments, "--updates", 3, "--quiet")
    assert result.stdout == ""
    assert [json.loads(line)["update"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_dry_run(tiny_folder: Path, tmp_path: Path) -> None:
    result = genkit("train", "token", "--model", tiny_folder, "--classes", "seven", "--out", tmp_path / "t", "--dry-run", "--k", 3)
    assert "Would train <seven> (seven) with digits-classifier" in result.stdout
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", ""], "--classes is empty"),
        (["--classes", "seven,seven"], "'seven' is there twice"),
        (["--classes", "x="], "'x=' names no class"),
        (["--classes", "Seven"], "must be 1 to 40 lower-case"),
        (["--classes", "seven", "--prompt", "a red seven"], "says nowhere where the token goes"),
        (["--classes", "seven", "--k", "0"], "evaluations=0 must be at least 1"),
        (["--classes", "seven", "--model", "digit"], "Unknown model 'digit'"),
        (["--classes", "seven", "--dtype", "float16"], "Unknown dtype 'float16'"),
        (["--classes", "seven", "--sampler", "eular"], "Did you mean 'euler'?"),
        (["--classes", "eleven"], "has no class named 'eleven'"),
        (["--classes", "seven"], "made for images of 32 pixels, but the model draws 16"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    result = genkit("train", "token", "--out", tmp_path, "--model", tiny_folder, *arguments, code=2)
    assert message in result.stderr


def test_classes() -> None:
    assert parse_classes(" seven, bar=702 ,") == {"seven": "seven", "bar": "702"}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_sample_with_a_token_and_from_its_picture(trained: tuple[Path, dict], tiny_folder: Path, tmp_path: Path) -> None:
    """A recipe holds what the token is, not where its file lies: the user names it again, wherever it is."""
    file = trained[0] / "two.safetensors"
    arguments = ["sample", "a red <two>", "--model", tiny_folder, "--steps", 2]
    genkit(*arguments, "--token", file, "--out", tmp_path / "a")
    genkit(*arguments, "--out", tmp_path / "plain")
    (made,) = (path for path in (tmp_path / "a").glob("*.png"))
    (plain,) = (path for path in (tmp_path / "plain").glob("*.png"))
    assert read_recipe(made).tokens == (read_token(file).identity,)
    assert "TI hashes" in Image.open(made).text["parameters"]
    assert np.abs(pixels(made) - pixels(plain)).max() > 0

    again = ["sample", "--from", made, "--model", tiny_folder, "--out", tmp_path / "b"]
    result = genkit(*again, code=2)
    assert "The recipe uses the token '<two>'. Name its file: --token FILE." in result.stderr
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes(file.read_bytes())
    genkit(*again, "--token", copy)
    assert np.array_equal(pixels(tmp_path / "b" / made.name), pixels(made))

    with pytest.raises(ValueError, match=r"uses the token '<two>:[0-9a-f]{12}'. Load its file"):
        run_batch(load(str(tiny_folder)), [read_recipe(made)])


def test_sample_refuses_bad_token_files(trained: tuple[Path, dict], tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["sample", "a <two>", "--model", tiny_folder, "--out", tmp_path, "--token"]
    assert "no token file" in genkit(*arguments, tmp_path / "none.safetensors", code=2).stderr
    (tmp_path / "cut.safetensors").write_bytes((trained[0] / "two.safetensors").read_bytes()[:-4])
    assert "truncated" in genkit(*arguments, tmp_path / "cut.safetensors", code=2).stderr


def test_recipes_without_tokens_keep_their_hash() -> None:
    recipe = Recipe(prompt="a red seven", seed=3)
    assert recipe.hash == "53969fc94fcb"
    assert "tokens" not in recipe.to_dict()
    assert Recipe.from_json(recipe.to_json()) == recipe
    other = Recipe(prompt="a red seven", seed=3, tokens=("<x>:0123456789ab",))
    assert other.hash != recipe.hash
    assert Recipe.from_json(other.to_json()) == other


@pytest.mark.parametrize("tokens", ["<x>:0123456789ab", ["<x>"], ["/etc/passwd"], [3], ["<x>:0123456789ab"] * 65])
def test_recipes_refuse_malformed_tokens(tokens: object) -> None:
    with pytest.raises(ValueError, match="tokens must be"):
        Recipe(prompt="a", tokens=tokens)
