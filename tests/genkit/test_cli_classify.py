"""`genkit classify` on a tiny random model: what it writes, what it refuses, and that nothing finished is lost."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.journal import Journal
from genkit.pipelines import DiffusionClassifierPipeline
from genkit.scoring import PairPlan
from tests.processes import stopped, two_processes

LABELS = ["seven", "cat"]


def classify(*arguments: object, code: int = 0):
    """Run `genkit classify` in this process; every test says which exit code it expects."""
    result = CliRunner().invoke(app, ["classify", *(str(argument) for argument in arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures in folders that are named after the labels."""
    rng = np.random.default_rng(0)
    for i in range(6):
        file = tmp_path / "data" / LABELS[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (18, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "data"


@pytest.fixture
def options(tiny_folder: Path) -> tuple[object, ...]:
    """All that a good command line has besides images."""
    return ("--model", tiny_folder, "--labels", "seven,cat", "--prompt", "a {}", "--pairs", 4, "--policy", "exhaustive")


def test_json_and_what_the_pipeline_says(folder: Path, options: tuple[object, ...], tiny_folder: Path) -> None:
    document = json.loads(classify(folder, *options, "--json").stdout)
    figures = {"accuracy", "accuracy_interval", "class_balanced_accuracy", "count", "seconds", "attention"}
    assert set(document) == {"results", "failed", *figures}
    files = sorted(folder.rglob("*.png"))
    assert [result["image"] for result in document["results"]] == list(map(str, files))
    pipe = DiffusionClassifierPipeline.from_pretrained(tiny_folder)
    out = pipe([Image.open(file) for file in files], LABELS, template="a {}", policy="exhaustive", plan=PairPlan(count=4))
    for result, label, scores in zip(document["results"], out.labels, out.scores, strict=True):
        assert set(result) == {"image", "label", "probability", "scores", "evaluations", "error_bound", "truth"}
        assert result["label"] == label
        assert result["scores"] == pytest.approx(scores, rel=1e-5)
        assert result["evaluations"] == 8
        assert result["truth"] == Path(result["image"]).parent.name
    hits = [result["label"] == result["truth"] for result in document["results"]]
    assert document["accuracy"] == pytest.approx(np.mean(hits))
    assert document["failed"] == []


def test_table_for_people(folder: Path, options: tuple[object, ...]) -> None:
    text = classify(folder, *options).stdout
    assert "8 network evaluations each" in text
    assert "Accuracy" in text
    assert "class-balanced" in text
    assert classify(folder / "cat" / "1.png", *options, "--quiet").stdout == ""
    assert "Accuracy" not in classify(folder, *options, "--no-accuracy").stdout


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out"])
def test_files(folder: Path, options: tuple[object, ...], tmp_path: Path, name: str) -> None:
    stdout = classify(folder, *options, "--out", tmp_path / name).stdout
    assert "Written" in stdout
    places = {"out.csv": ["out.csv"], "out.json": ["out.json"], "out": ["out/results.csv", "out/results.json"]}[name]
    for place in places:
        text = (tmp_path / place).read_text()
        rows = json.loads(text)["results"] if place.endswith("json") else list(csv.DictReader(text.splitlines()))
        assert [row["image"] for row in rows] == sorted(map(str, folder.rglob("*.png")))
        assert {row["label"] for row in rows} <= set(LABELS)
        if place.endswith("csv"):
            assert float(rows[0]["score of cat"]) > 0
            assert rows[0]["truth"] == "cat"
    assert not list(tmp_path.glob(".*"))


def test_resume_does_what_is_missing_and_only_that(folder: Path, options: tuple[object, ...], tmp_path: Path, monkeypatch) -> None:
    line = (folder, *options, "--out", tmp_path / "out.csv")
    classify(*line)
    whole, journal = (tmp_path / "out.csv").read_text(), tmp_path / "out.jsonl"
    assert "holds results. Add --resume" in classify(*line, code=2).stderr
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])  # three results, and a fourth that a crash cut off
    changed = Path(json.loads(lines[1])["image"])
    Image.open(changed).rotate(90).save(changed)
    counted = []
    original = Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, record: counted.append(record["image"]) or original(self, record))
    classify(*line, "--resume")
    assert len(counted) == 4
    assert str(changed) in counted
    assert len((tmp_path / "out.csv").read_text().splitlines()) == len(whole.splitlines())
    kept = [row for row in whole.splitlines() if str(changed) not in row]
    again = (tmp_path / "out.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in kept] == [row.split(",")[:3] for row in again if str(changed) not in row]
    classify(*line, "--resume")
    assert len(counted) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--policy", "race"], "was made with policy 'exhaustive', but this run has policy 'race'"),
        (["--prompt", "the {}"], "was made with template ['a {}'], but this run has template ['a {}', 'the {}']"),
        (["--seed", 7], "'seed': 42}, but this run has plan {'count': 4, 'weighting': 'uniform', 'seed': 7}"),
    ],
)
def test_resume_refuses_other_settings(folder, options, tmp_path, change, says) -> None:
    line = (folder, *options, "--out", tmp_path / "out.json")
    classify(*line)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert says in classify(*line, *change, "--resume", code=2).stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    classify(*line, "--resume", "--batch", 3, "--no-fold", "--device", "cpu")  # these decide no result


def test_a_file_that_is_no_journal(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"mine": 1}\n')
    assert "is no journal of genkit" in classify(folder, *options, "--out", tmp_path / "out.json", "--resume", code=2).stderr
    assert (tmp_path / "out.jsonl").read_text() == '{"mine": 1}\n'


def test_interrupted(folder: Path, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Journal.append

    def interrupt_after_two(self: Journal, record: dict) -> None:
        original(self, record)
        if len(self.records()) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", interrupt_after_two)
    line = (folder, *options, "--out", tmp_path / "out.json")
    result = classify(*line, "--json", code=130)
    assert "Interrupted after 2 of 6 images. Repeat with --resume to finish." in result.stderr
    document = json.loads(result.stdout)
    assert document["interrupted"]
    assert len(document["results"]) == 2
    assert not (tmp_path / "out.json").exists()
    monkeypatch.undo()
    assert len(json.loads(classify(*line, "--resume", "--json").stdout)["results"]) == 6


def test_one_bad_image_costs_no_other(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (folder / "cat" / "0.png").write_bytes(b"no image")
    Image.new("RGBA", (9, 9)).save(folder / "cat" / "clear.png")
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(folder / "cat" / "moves.gif", save_all=True, append_images=frames[1:])
    result = classify(folder, *options, "--json", "--out", tmp_path / "out.csv", code=3)
    document = json.loads(result.stdout)
    assert len(document["results"]) == 8
    assert [failed["image"] for failed in document["failed"]] == [str(folder / "cat" / "0.png")]
    assert "0.png' cannot be read" in result.stderr
    assert "clear.png' is transparent; it is put on white." in result.stderr
    assert "moves.gif' has several frames; the first one is read." in result.stderr
    Image.new("RGB", (9, 9)).save(folder / "cat" / "0.png")
    assert len(json.loads(classify(folder, *options, "--json", "--out", tmp_path / "out.csv", "--resume").stdout)["results"]) == 9


def test_only_bad_images(tmp_path: Path, options: tuple[object, ...]) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    result = classify(tmp_path, *options, "--out", tmp_path / "out.csv", code=2)
    assert "a.png' cannot be read" in result.stderr
    assert not (tmp_path / "out.csv").exists()


def test_tree_prior_pmi_and_several_prompts(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(json.dumps({"a red": ["seven"], "a yellow": ["cat"]}))
    tree = json.loads(classify(folder, *options, "--policy", "tree", "--hierarchy", tmp_path / "tree.json", "--json").stdout)
    for result in tree["results"]:
        assert sorted(score is None for score in result["scores"].values()) == [False, True]
    more = ["--prior", "seven=0.9, cat=0.1", "--pmi", "--prompt", "a red {}", "--reduce", "mean", "--weighting", "elbo"]
    document = json.loads(classify(folder, *options, *more, "--json").stdout)
    assert document["results"][0]["evaluations"] == 2 * 2 * 4 + 4


def test_inversion_among_many_labels(folder: Path, options: tuple[object, ...], tiny_folder: Path) -> None:
    labels = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "cat", "dog"]
    some = sorted(folder.rglob("*.png"))[:2]
    options = (*options, "--labels", ",".join(labels), "--policy", "dive", "--pairs", 8)
    document = json.loads(classify(*some, *options, "--json").stdout)
    pipe = DiffusionClassifierPipeline.from_pretrained(tiny_folder)
    out = pipe([Image.open(file) for file in some], labels, template="a {}", policy="dive", plan=PairPlan(count=8))
    assert [result["label"] for result in document["results"]] == out.labels
    assert [result["evaluations"] for result in document["results"]] == list(out.evaluations)
    # Labels that the search never met have no score.
    met = [sum(score is not None for score in result["scores"].values()) for result in document["results"]]
    assert all(1 < count <= len(labels) for count in met)


def test_labels_of_a_file(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("# animals\nthree\n\n")
    document = json.loads(classify(folder, *options, "--labels-file", tmp_path / "labels.txt", "--json").stdout)
    assert set(document["results"][0]["scores"]) == {"seven", "cat", "three"}


def test_dry_run(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    document = json.loads(classify(folder, *options, "--dry-run", "--json").stdout)
    assert document["count"] == 6
    assert document["most_evaluations"] == 8
    assert document["accuracy"]
    assert "Would classify 6 images into 2 labels (seven, cat) by exhaustive" in classify(folder, *options, "--dry-run").stdout


def test_the_card_of_a_model_has_labels_and_prompts(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    document = json.loads(classify(folder, "--dry-run", "--json").stdout)
    assert len(document["prompts"]) == 10
    assert document["prompts"]["eight"] == "an eight"
    some = json.loads(classify(folder, "--labels", "two,eight", "--dry-run", "--json").stdout)
    assert some["prompts"] == {"two": "a two", "eight": "an eight"}
    assert json.loads(classify(folder, "--labels", "1,2", "--prompt", "a {}", "--dry-run", "--json").stdout)["template"] == ["a {}"]
    assert json.loads(classify(folder, "--labels", "cat,dog", "--dry-run", "--json").stdout)["labels"] == ["cat", "dog"]
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "card.json").write_text('{"class_prompts": {"cat": "a red cat", "seven": "a seven"}}')
    own = json.loads(classify(folder, "--model", model, "--dry-run", "--json").stdout)
    assert own["prompts"] == {"cat": "a red cat", "seven": "a seven"}
    (model / "card.json").write_text('{"class_prompts": ["cat"]}')
    assert "are no mapping of labels to prompts" in classify(folder, "--model", model, "--dry-run", code=2).output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--labels", ""], "There is nothing to tell apart: no labels"),
        (["--labels", "cat"], "There is nothing to tell apart: ['cat']"),
        (["--labels", "cat,dog,cat"], "The label 'cat' is there twice"),
        (["--labels-file", "nowhere.txt"], "The labels file 'nowhere.txt' cannot be read"),
        (["--prompt", "a photo"], "The template 'a photo' has no {}"),
        (["--policy", "rase"], "Unknown policy 'rase'. Did you mean 'race'"),
        (["--policy", "tree"], "'tree' needs a hierarchy"),
        (["--hierarchy", "nowhere.json"], "The hierarchy 'nowhere.json' cannot be read"),
        (["--budget", 1], "A budget of 1 evaluations is below one pair for each of 2 classes"),
        (["--policy", "race", "--alpha", 0], "alpha=0.0 is no probability"),
        (["--metric", "l3"], "Unknown metric 'l3'"),
        (["--weighting", "vlb"], "Unknown weighting 'vlb'"),
        (["--reduce", "max"], "Unknown reduction of prompts 'max'"),
        (["--prior", "cat"], "--prior 'cat' is not LABEL=PROBABILITY"),
        (["--prior", "cat=1"], "The prior says nothing of 'seven'"),
        (["--temperature", 0], "temperature=0.0 must be positive"),
        (["--dtype", "float33"], "Unknown dtype 'float33'"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--out", "results.txt"], "is neither FILE.csv nor FILE.json, nor a folder"),
        (["--model", "dgits"], "Unknown model 'dgits'"),
    ],
)
def test_wrong_values(folder: Path, options: tuple[object, ...], change: list[object], says: str) -> None:
    result = classify(folder / "cat" / "1.png", *options, *change, code=2)
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_wrong_paths(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in classify(tmp_path / "empty", *options, code=2).stderr
    assert "There is no file or folder" in classify(tmp_path / "nowhere.png", *options, code=2).stderr
    (tmp_path / "file").write_text("keep me")
    assert "is or lies below a file" in classify(folder, *options, "--out", tmp_path / "file" / "out", code=2).stderr
    (tmp_path / "broken.json").write_text("{")
    for content, says in (("{", "is not JSON"), ('{"a": 3}', "is not of the form")):
        (tmp_path / "broken.json").write_text(content)
        assert says in classify(folder, *options, "--hierarchy", tmp_path / "broken.json", code=2).stderr
    assert "There are no labels" in classify(folder, *options[:2], code=2).stderr


def test_accuracy_needs_folders_that_are_labels(folder: Path, options: tuple[object, ...]) -> None:
    (folder / "cat").rename(folder / "pets")
    assert "accuracy" not in json.loads(classify(folder, *options, "--json").stdout)
    message = classify(folder, *options, "--accuracy", code=2).stderr
    assert "Accuracy needs folders that are named after labels" in message
    assert "is in 'pets'" in message


def test_two_processes_say_what_one_says(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    line = [str(a) for a in ("classify", folder, *options, "--device", "cpu", "--json", "--out")]
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    _, stdout, stderr = two_processes([*line, str(tmp_path / "two.csv")], **environment)
    two, one = (json.loads(text) for text in (stdout, CliRunner().invoke(app, [*line, str(tmp_path / "one.csv")]).stdout))
    assert len(two["results"]) == 6, stderr
    assert two["failed"] == one["failed"]
    assert two["accuracy"] == one["accuracy"]
    for a, b in zip(two["results"], one["results"], strict=True):
        assert a["image"] == b["image"]
        assert a["label"] == b["label"]
        assert a["evaluations"] == b["evaluations"]
        assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)
    assert (tmp_path / "two.1.jsonl").is_file()
    # A later run of one process takes up what both have left.
    resumed = CliRunner().invoke(app, [*line, str(tmp_path / "two.csv"), "--resume"])
    assert json.loads(resumed.stdout)["results"] == two["results"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_keeps_what_is_finished(folder: Path, options: tuple[object, ...], tmp_path: Path) -> None:
    for i in range(200):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / "cat" / f"more{i}.png")
    line = [str(a) for a in ("classify", folder, *options, "--pairs", 64, "--batch", 8, "--out", tmp_path / "out.csv", "--json")]
    journal = tmp_path / "out.jsonl"
    code, stdout, stderr = stopped(line, lambda: journal.is_file() and len(journal.read_text().splitlines()) > 2, seconds=120)
    assert code == 130, stderr
    finished = json.loads(stdout)["results"]
    assert 2 <= len(finished) < 206
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(finished) + 1
