"""`genkit synth`, on tiny random models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.cli.synth import parse_labels, read_texts
from genkit.distill import LatentDataset
from tests import tiny
from tests.processes import stopped, two_processes


def genkit(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["synth", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dit"
    tiny.pipeline("dit").save_pretrained(folder)
    return folder


def test_prompts_of_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# comment\na red seven\n\na blue cat\n")
    line = ["--teacher", tiny_folder, "--prompts", tmp_path / "p.txt", "--count", 5, "--steps", 2, "--out", tmp_path / "d"]
    document = json.loads(genkit(*line, "--shard-size", 2, "--sampler", "ddim", "--json").stdout)
    assert document["count"] == 5
    assert document["prompts"] == 2
    assert document["shapes"] == [[4, 8, 8]]
    assert document["paired"]
    data = LatentDataset(tmp_path / "d")
    assert data.prompts == ["a red seven", "a blue cat", "a red seven", "a blue cat", "a red seven"]
    assert sorted(file.name for file in (tmp_path / "d").iterdir()) == [
        *(f"shard-0000{i}.safetensors" for i in range(3)),
        "synth.json",
    ]
    again = ["--shard-size", 2, "--sampler", "ddim", "--resume"]
    assert "already holds this data. Use --resume" in genkit(*line, *again[:-1], code=2).stderr
    (tmp_path / "d" / "shard-00001.safetensors").write_bytes(b"")
    assert "5 items of" in genkit(*line, *again).stdout
    assert len(LatentDataset(tmp_path / "d")) == 5
    assert "it has steps 2, but here it is steps 3" in genkit(*line, *again, "--steps", 3, code=2).stderr


def test_prompts_of_the_command_line_and_of_jsonl(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a blue cat", "file_name": "x.png"}\n{"text": "a green three"}\n')
    line = ["--teacher", tiny_folder, "--prompts", tmp_path / "p.jsonl", "--prompt", "a seven", "--steps", 1, "--embeds"]
    assert genkit(*line, "--size", "20x16", "--out", tmp_path / "d", "--quiet").stdout == ""
    data = LatentDataset(tmp_path / "d")
    assert data.prompts == ["a seven", "a blue cat", "a green three"]
    assert data.shapes == [(4, 8, 10)]
    assert data.record["embeds"]


def test_captions_of_the_digits(tiny_folder: Path, tmp_path: Path) -> None:
    genkit("--teacher", tiny_folder, "--captions", "digits", "--count", 6, "--steps", 1, "--out", tmp_path / "d")
    assert LatentDataset(tmp_path / "d").prompts == read_texts(None, [], "digits", 6)
    captions = read_texts(None, [], "digits", 1000) or []
    assert sum(" on a" in text and " background" in text for text in captions) > 600


def test_labels(dit_folder: Path, tmp_path: Path) -> None:
    genkit("--teacher", dit_folder, "--labels", "5-7", "--count", 4, "--steps", 1, "--out", tmp_path / "d")
    assert LatentDataset(tmp_path / "d").labels == [5, 6, 7, 5]
    assert parse_labels("seven, 207,1-3, well-known") == ["seven", 207, 1, 2, 3, "well-known"]


def test_dry_run_does_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    line = ["--teacher", tiny_folder, "--captions", "digits", "--count", 4000, "--out", tmp_path / "d", "--dry-run"]
    assert "Would sample 4,000 items" in genkit(*line).stdout
    assert json.loads(genkit(*line, "--json").stdout)["count"] == 4000
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing says what to draw"),
        (["--captions", "digit", "--count", "3"], "Unknown captions 'digit'. Did you mean 'digits'?"),
        (["--captions", "digits"], "--captions digits has no end. Give --count"),
        (["--captions", "digits", "--count", "3", "--prompt", "a"], "Both --captions and prompts were given"),
        (["--prompts", "nowhere.txt"], "'nowhere.txt' cannot be read"),
        (["--prompt", "a", "--labels", "3"], "Both prompts and labels were given"),
        (["--labels", "3"], "takes no labels"),
        (["--labels", "9-3"], "the range '9-3' runs backwards. Write 3-9"),
        (["--labels", ", "], "--labels ', ' names no class"),
        (["--prompt", "a", "--sampler", "eular"], "Unknown sampler 'eular'"),
        (["--prompt", "a", "--storage", "int8"], "Unknown storage 'int8'"),
        (["--prompt", "a", "--size", "wide"], "Size 'wide' is not WIDTHxHEIGHT"),
        (["--prompt", "a", "--size", "15x16"], "width=15 does not fit the model"),
        (["--prompt", "a", "--device", "gpu"], "Unknown device 'gpu'"),
        (["--prompt", "a", "--dtype", "float8"], "Unknown dtype 'float8'"),
        (["--prompt", "a", "--teacher", "digit"], "Unknown model 'digit'"),
        (["--prompt", "a", "--seed", "-1"], "seed=-1 must be 0 to"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tiny_folder: Path, tmp_path: Path) -> None:
    line = ["--teacher", tiny_folder, "--steps", 1, *arguments, "--out", tmp_path / "d"]
    assert message in genkit(*line, code=2).stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"caption": "b"}', "Entry 2 of the prompts file"),
        ('["a"]', "Entry 1 of the prompts file"),
        ("a red seven", 'is not {"text": "..."}: a red seven'),
        ('{"text": 3}', "Entry 1 of the prompts file"),
        ("\n", "holds no prompt"),
    ],
)
def test_bad_jsonl(content: str, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    line = ["--teacher", tiny_folder, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "d"]
    assert message in genkit(*line, code=2).stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_keeps_finished_shards(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    line = ["synth", "--teacher", str(tiny_folder), "--prompt", "a seven", "--count", "500", "--steps", "9", "--shard-size", "4"]
    code, stdout, stderr = stopped([*line, "--out", str(out), "--json"], (out / "shard-00001.safetensors").exists)
    assert code == 130, stderr
    assert "Repeat the command with --resume" in stderr
    assert json.loads(stdout)["interrupted"]
    assert not list(out.glob(".*"))
    data = LatentDataset(out, skip_bad=True)
    assert 8 <= len(data) < 500
    assert len(data) % 4 == 0


def test_two_processes_make_what_one_makes(tiny_folder: Path, tmp_path: Path) -> None:
    line = ["--teacher", str(tiny_folder), "--prompt", "a red seven", "--count", "10", "--steps", "2", "--shard-size", "3"]
    line += ["--device", "cpu", "--sampler", "euler-a", "--storage", "float32", "--out"]
    code, stdout, stderr = two_processes(["synth", *line, str(tmp_path / "two"), "--json"])
    assert code == 0, stderr
    assert json.loads(stdout)["count"] == 10
    genkit(*line, tmp_path / "one")
    one, two = (LatentDataset(tmp_path / name) for name in ("one", "two"))
    assert torch.allclose(one.latents(range(10)), two.latents(range(10)), atol=1e-5)
    assert one.seeds == two.seeds
    assert one.record == two.record


def test_a_recipe_and_what_wins_over_it(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[synth]\nguidance_scale = 2.5\nsteps = 7\nsampler = "ddim"\nembeds = true\nshard_size = 3\n')
    line = ["--teacher", tiny_folder, "--prompt", "a seven", "--out", tmp_path / "d", "--dry-run", "--json"]
    plan = json.loads(genkit(*line, "--recipe", recipe, "--steps", 9).stdout)
    assert plan["steps"] == 9
    assert plan["guidance_scale"] == 2.5
    assert plan["sampler"] == "ddim"
    assert plan["embeds"]
    assert plan["shard_size"] == 3
    assert plan["storage"] == "float16"
    plain = json.loads(genkit(*line).stdout)
    assert plain["steps"] == 50
    assert plain["guidance_scale"] == 3.0
    assert not plain["embeds"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[synth]\nguidance = 2\n", "Unknown setting of samples 'guidance'. Did you mean 'guidance_scale'?"),
        ('[synth]\nsteps = "many"\n', "A setting has a value of another type"),
        ("[synth]\nsteps = 0\n", "steps=0 must be at least 1."),
        ("synth = {\n", "is no TOML"),
    ],
)
def test_recipes_that_cannot_be_used(content: str, message: str, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(content)
    line = ["--teacher", tiny_folder, "--prompt", "a seven", "--out", tmp_path / "d"]
    assert message in " ".join(genkit(*line, "--recipe", recipe, code=2).stderr.split())
    assert "There is no recipe" in genkit(*line, "--recipe", tmp_path / "none.toml", code=2).stderr
