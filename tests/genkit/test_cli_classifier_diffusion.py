"""`genkit train classifier-diffusion`: a class-conditional diffusion model from a labelled folder, and what it is good for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.data import shortcut
from genkit.data.source import open_source
from genkit.denoisers import Denoiser
from genkit.scoring import PairPlan, Scorer
from genkit.training import TrainConfig
from genkit.zoo.training import class_conditional
from genkit.zoo.training.class_conditional import ClassConditionalConfig, load_vae, train_class_conditional
from genkit.zoo.training.text_to_latent import TextToLatent, tokenize
from genkit.zoo.training.tokenizer import class_tokenizer
from tests import tiny
from tests.processes import two_processes

QUICK = ["--channels", "16", "--steps", 3, "--batch", 4, "--validate-every", 2, "--device", "cpu"]


def train(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["train", "classifier-diffusion", *map(str, arguments)], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of the shortcut benchmark, in folders."""
    folder = tmp_path_factory.mktemp("data")
    shortcut.write(folder, splits=("val",))
    for name in set(shortcut.CLASSES) - {"zero", "one", "seven"}:
        shutil.rmtree(folder / "val" / name)
    return folder / "val"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A model after three steps, and what --json said."""
    out = tmp_path_factory.mktemp("model")
    return out, json.loads(train("--data", data, "--out", out, *QUICK, "--json").stdout)


def test_makes_a_stock_pipeline_of_the_class_names(trained: tuple[Path, dict]) -> None:
    out, document = trained
    assert document["classes"] == ["one", "seven", "zero"]
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("seven", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)
    ids = [tuple(pipe.tokenizer(name).input_ids) for name in document["classes"]]
    assert len(set(ids)) == 3
    assert all(len(row) == 3 for row in ids)
    assert not list(out.rglob("*.bin"))
    # It names no folder of this machine.
    assert AutoencoderKL.load_config(out / "vae").get("_name_or_path", "") == ""


def test_the_card_says_what_the_model_is(trained: tuple[Path, dict], data: Path) -> None:
    out, document = trained
    card = json.loads((out / "card.json").read_text())
    assert card.items() <= document.items()
    assert card["counts"] == [40, 40, 40]
    assert card["class_prompts"] == {name: name for name in sorted(card["class_prompts"])}
    assert card["data"] == data.name
    assert card["vae"] == "digits"
    networks = [StableDiffusionPipeline.from_pretrained(out).components[name] for name in ("unet", "text_encoder")]
    assert card["parameters"] == sum(p.numel() for network in networks for p in network.parameters())
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "validation" in line] == [2, 3]
    assert card["kept"]["validation_loss"] == min(line["validation"]["loss"] for line in log)


def test_resume_goes_on_and_another_run_is_refused(trained: tuple[Path, dict], data: Path, tmp_path: Path) -> None:
    out = shutil.copytree(trained[0], tmp_path / "copy")
    message = train("--data", data, "--out", out, *QUICK, code=2).stderr
    assert "already holds a run. Use --resume" in message
    result = train("--data", data, "--out", out, *QUICK, "--steps", 5, "--resume", "--quiet")
    assert result.output == ""
    log = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 3, 4, 5]
    for option, value, name in (("--channels", "32", "block_out_channels"), ("--label-dropout", 0.0, "label_dropout")):
        message = train("--data", data, "--out", out, *QUICK, option, value, "--resume", code=2).stderr
        assert f"was made with other {name}. Use another --out." in message


def test_interrupted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third step: the checkpoint is there, and the resumed run ends where an uninterrupted one does."""
    loss, calls = class_conditional.velocity_loss, []

    def interrupts(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(class_conditional, "velocity_loss", interrupts)
    line = ["--data", data, "--out", tmp_path, *QUICK, "--validate-every", 3, "--no-bf16"]
    result = train(*line, "--json", code=130)
    assert "Repeat the command with --resume" in result.stderr
    assert json.loads(result.stdout)["interrupted"]
    assert torch.load(tmp_path / "training" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "model_index.json").exists()
    monkeypatch.setattr(class_conditional, "velocity_loss", loss)
    resumed = json.loads(train(*line, "--resume", "--json").stdout)
    whole = json.loads(train(*line[:3], tmp_path / "whole", *line[4:], "--json").stdout)
    assert resumed["kept"] == whole["kept"]


def test_dry_run(data: Path, tmp_path: Path) -> None:
    result = train("--data", data, "--out", tmp_path / "m", "--dry-run")
    assert "3 classes, 120 pictures) for 4,000 steps" in " ".join(result.stdout.split())
    assert not (tmp_path / "m").exists()


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders that are wrong in one way each."""

    def put(*names: str) -> None:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / name)

    put("flat/a.png", "single/cat/a.png", "lonely/cat/a.png", "lonely/dog/a.png")
    put("good/cat/a.png", "good/cat/b.png", "good/dog/a.png", "good/dog/b.png")
    put("case/Cat/a.png", "case/Cat/b.png", "case/cat/a.png", "case/cat/b.png")
    put(f"long/{'42' * 40}/a.png", f"long/{'42' * 40}/b.png", "long/cat/a.png", "long/cat/b.png")
    put("other/cat/a.png", "other/cow/a.png", "broken/cat/a.png", "broken/dog/a.png")
    (tmp_path / "broken" / "cat" / "a.png").write_text("no picture")
    (tmp_path / "broken" / "cat" / "b.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("none", [], "There is no folder"),
        ("empty", [], "no images"),
        ("flat", [], "has no classes. Put the pictures of each class into a subfolder"),
        ("single", [], "has one class only, 'cat'"),
        ("lonely", [], "'cat' has one picture only"),
        ("case", [], "'Cat' and 'cat' differ in case or spaces only"),
        ("long", [], "has 82 tokens, more than 77"),
        ("broken", ["--val", "good"], "a.png"),
        ("good", ["--val", "none"], "There is no folder"),
        ("good", ["--val", "flat"], "'flat' has no classes"),
        ("good", ["--val", "other"], "The validation pictures have the class 'cow'"),
        ("good", ["--channels", "24"], "must be positive multiples of 16"),
        ("good", ["--channels", "wide"], "--channels 'wide' is not a list"),
        ("good", ["--size", "30"], "size=30 does not fit the VAE and the U-Net. Use a positive multiple of 8"),
        ("good", ["--vae", "digits-judge"], "'digits-judge' holds no AutoencoderKL"),
        ("good", ["--device", "gpu"], "Unknown device 'gpu'"),
    ],
)
def test_bad_input(folders: Path, data: str, arguments: list[str], message: str) -> None:
    line = [str(folders / a) if a in ("none", "flat", "other", "good") else a for a in arguments]
    result = train("--data", folders / data, "--out", folders / "out", "--steps", 1, *line, code=2)
    assert message in result.stderr


def test_a_vae_whose_latents_are_shifted(tmp_path: Path) -> None:
    vae = tiny.pipeline("stable_diffusion").vae
    vae.register_to_config(shift_factor=0.1)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are shifted, which StableDiffusionPipeline does not undo"):
        load_vae(str(tmp_path))


def test_a_vae_that_is_nowhere() -> None:
    with pytest.raises(OSError, match="The VAE 'nobody/nothing' is no folder here"):
        load_vae("nobody/nothing")


@pytest.mark.parametrize(
    "arguments",
    [{"label_dropout": 1.0}, {"dropout": 1.0}, {"held_out": 0.0}, {"block_out_channels": ()}, {"block_out_channels": (0,)}],
)
def test_bad_settings(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ClassConditionalConfig(**arguments)


def test_class_names_of_all_kinds() -> None:
    """Words become one token each; numbers, underscores and other scripts fall apart, but no two names meet."""
    names = ["cat", "golden retriever", "n01440764", "n01440765", "black_cat", "café", "猫", "A380"]
    tokenizer = class_tokenizer(names)
    assert len(tokenizer("golden retriever").input_ids) == 4
    assert tokenizer.model_max_length == max(len(tokenizer(name).input_ids) for name in names)


def test_dropout_acts_in_training_only() -> None:
    tokenizer = class_tokenizer(["one", "two"])
    model = TextToLatent(tokenizer, 8, block_out_channels=(16,), dropout=0.5)
    z, tokens = torch.randn(2, 4, 8, 8), tokenize(tokenizer, ["one", "two"])
    for training in (True, False):
        model.train(training)
        first, second = (model(z, torch.tensor([10, 20]), tokens) for _ in range(2))
        assert torch.equal(first, second) is not training


def test_learns_to_classify(data: Path, tmp_path: Path) -> None:
    """Three digits in their own inks are told apart by the losses after some seconds; chance is a third."""
    config = ClassConditionalConfig(
        block_out_channels=(16, 32),
        train=TrainConfig(steps=80, batch_size=32, lr=4e-3, warmup=10, ema_decay=0.9, validate_every=40, bf16=False),
    )
    source = open_source(data)
    card = train_class_conditional(source, tmp_path, config)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    denoiser = Denoiser.of(pipe)
    scorer = Scorer(denoiser, PairPlan(count=6))
    rows = range(0, len(source), 4)
    with torch.no_grad():
        latents = denoiser.encode(source.images(rows, (32, 32)))
    scores = scorer.table(latents, denoiser.condition(prompts=list(card["class_prompts"]))).mean(2)
    truth = torch.tensor([list(card["class_prompts"]).index((source.labels or [])[row]) for row in rows])
    assert (scores.argmin(1) == truth).float().mean() >= 0.8


def test_two_processes_share_the_pictures(data: Path, tmp_path: Path) -> None:
    line = ["train", "classifier-diffusion", "--data", str(data), "--out", str(tmp_path), *map(str, QUICK)]
    code, stdout, stderr = two_processes([*line, "--json"])
    assert code == 0, stderr
    assert json.loads(stdout)["kept"]["step"] in (2, 3)
    # Both validate the same weights on the same pictures, so both keep the same.
    logs = [[json.loads(row) for row in (tmp_path / "training" / f"log{r}.jsonl").read_text().splitlines()] for r in ("", 1)]
    assert [row.get("validation") for row in logs[0]] == [row.get("validation") for row in logs[1]]
    StableDiffusionPipeline.from_pretrained(tmp_path)


def test_training_times_of_choice(data: Path, tmp_path: Path) -> None:
    chosen = ("--times", "logit-normal:0.3,0.8", "--json")
    document = json.loads(train("--data", data, "--out", tmp_path / "a", *QUICK, *chosen).stdout)
    assert document["training"]["times"] == "logit-normal:0.3,0.8"
    assert "Unknown noise distribution 'cosine'" in train("--data", data, "--out", tmp_path, "--times", "cosine", code=2).stderr


def test_dropout_of_choice(data: Path, tmp_path: Path) -> None:
    document = json.loads(train("--data", data, "--out", tmp_path, *QUICK, "--dropout", 0.2, "--json").stdout)
    assert document["training"]["dropout"] == 0.2
    assert StableDiffusionPipeline.from_pretrained(tmp_path).unet.config.dropout == 0.2
    message = train("--data", data, "--out", tmp_path, *QUICK, "--dropout", 0.3, "--resume", code=2).stderr
    assert "was made with other dropout. Use another --out." in message
