"""`genkit reproduce`: every figure is whole, its commands exist; the machinery runs on a tiny checkpoint (no figure does)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from genkit import reproducing
from genkit.cli.app import app

NAMES = reproducing.names()
COMMAND = "classify {data}/images --labels-file {data}/labels.txt --prompt 'a {}' --model {model} --policy exhaustive --pairs 2"


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["reproduce", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes with a picture each."""
    rng = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "data" / "images" / name).mkdir(parents=True)
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture.save(tmp_path / "data" / "images" / name / "0.png")
    (tmp_path / "data" / "labels.txt").write_text("red\nblue\n")
    return tmp_path / "data"


def own(folder: Path, **changes: object) -> Path:
    """A figure of ours that one command makes in a second: the share of two pictures that is read right."""
    tables = {
        "figure": {"system": "test", "what": "accuracy", "value": 50.0, "unit": "%", "tolerance": 50.0, "source": "none",
                   "evidence": "none", "gpu_time": "none"},
        "needs": {"model": "a tiny model", "data": "two classes", "files": ["images", "labels.txt"]},
        "run": {"commands": [COMMAND],
                "result": "accuracy", "scale": 100.0},
    }  # fmt: skip
    for key, value in changes.items():
        next(table for table in tables.values() if key in table or (table is tables["figure"] and key == "extra"))[key] = value
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()) for name, table in tables.items()
    )
    (folder / "own.toml").write_text(text)
    return folder / "own.toml"


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_says_what_it_needs_and_its_commands_exist(name: str) -> None:
    figure = reproducing.read_figure(name)
    assert figure.missing(None, None)
    assert (
        (figure.value is not None and figure.result) or figure.gap or "no figure" in figure.evidence or "not be" in figure.evidence
    )
    root = typer.main.get_command(app)
    for line in figure.lines("MODEL", Path("DATA"), Path("WORK")):
        context, parser, rest = root.make_context("genkit", ["--version"], resilient_parsing=True), root, list(line)
        while hasattr(parser, "commands"):
            word = rest.pop(0) if rest[0] in parser.commands else "images"  # `genkit eval DIR` is `genkit eval images DIR`
            parser = parser.commands[word]
            context = parser.make_context(word, [], parent=context, resilient_parsing=True)
        parser.make_parser(context).parse_args(args=[*rest, "--json"])  # an unknown option is an error
        assert "{" not in shlex.join(rest).replace("'a photo of a {token}'", "").replace("{}", "")


def test_the_list(tmp_path: Path) -> None:
    document = json.loads(genkit("--json").stdout)
    assert [entry["name"] for entry in document["figures"]] == NAMES
    assert {entry["system"] for entry in document["figures"]} == {
        "Discriminator Guidance", "EluCD", "Discriminative Class Tokens", "Diffusion Classifier", "DIVE", "ADD", "LADD",
        "DreamTeacher", "Zero-shot part assembly",
    }  # fmt: skip
    assert "diffusion-classifier-cifar10" in genkit().stdout


def test_what_is_missing_is_said(data: Path, tmp_path: Path) -> None:
    text = genkit("diffusion-classifier-cifar10", code=2).stdout
    assert "88.5" in text
    assert "--model DIR: stabilityai/stable-diffusion-2-base" in text
    (data / "labels.txt").unlink()
    document = json.loads(genkit("diffusion-classifier-cifar10", "--data", data, "--json", code=2).stdout)
    assert [line.partition(":")[0] for line in document["missing"]] == [
        "the checkpoint, --model DIR",
        f"'{data / 'labels.txt'}' of the data",
    ]
    assert "There is no folder" in genkit("diffusion-classifier-cifar10", "--data", tmp_path / "nowhere", code=2).stderr
    assert "Did you mean 'dg-cifar10'" in genkit("dg-cifar", code=2).stderr
    assert "There is no folder" in genkit("dg-cifar10", "--model", tmp_path / "nowhere", code=2).stderr


def test_it_runs_and_compares(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    line = ["--model", tiny_folder, "--data", data, "--out", tmp_path / "work", "--json"]
    document = json.loads(genkit(own(tmp_path), *line).stdout)
    assert document["measured"] in (0, 50, 100)
    assert document["agrees"]
    document = json.loads(genkit(own(tmp_path, value=300.0, tolerance=1.0), *line, code=1).stdout)
    assert document["agrees"] is False
    plan = json.loads(genkit(own(tmp_path), *line, "--dry-run").stdout)
    assert plan["commands"][0][:3] == ["genkit", "classify", str(data / "images")]
    assert plan["missing"] == []


def test_a_command_that_fails_is_named(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    line = ["--model", tiny_folder, "--data", data, "--out", tmp_path / "work"]
    figure = own(tmp_path, commands=["classify {data}/images --model {model} --policy none"])
    assert "`genkit classify" in genkit(figure, *line, code=2).stderr
    assert "gave no number 'nothing.here'" in genkit(own(tmp_path, result="nothing.here"), *line, code=2).stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extra": 1}, "Unknown entry of a figure 'extra'"),
        ({"tolerance": "much"}, "tolerance of the figure 'own' must be a number"),
        ({"commands": []}, "needs commands"),
        ({"commands": [1]}, "commands of the figure 'own' must be texts"),
        ({"source": 3}, "source of the figure 'own' must be text"),
    ],
)
def test_a_figure_that_is_none(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    assert says in genkit(own(tmp_path, **changes), code=2).stderr
