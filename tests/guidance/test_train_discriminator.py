"""`genkit train discriminator` on tiny random models: what it writes, resuming, refusals, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.data.source import open_source
from genkit.guidance import DiscriminatorGuidance, NoisyClassifier, load_discriminator
from genkit.guidance.training import DiscriminatorConfig, train_discriminator
from genkit.pipelines import GuidedPipeline
from genkit.training import TrainConfig
from tests import tiny
from tests.processes import two_processes

HEAD = {"block_out_channels": (8,), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
TRAIN = TrainConfig(steps=4, batch_size=8, validate_every=2)
QUICK = {"count": 20, "steps": (2,), "head": HEAD, "train": TRAIN, "matching": TRAIN}
LINE = ["--count", "20", "--steps", "2", "--extractor", "none", "--width", "8", "--updates", "4", "--batch", "8", "--quiet"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twelve pictures of two classes, with captions."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        name = folder / ("zero", "one")[i % 2] / f"{i}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(name)
        name.with_suffix(".txt").write_text("a red seven" if i % 2 else "a blue three")
    return folder


def genkit(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


def train(folder, source, family="stable_diffusion", resume=False, **changes):
    pipe = GuidedPipeline.from_pipe(tiny.pipeline(family))
    return pipe, train_discriminator(pipe, source, folder, DiscriminatorConfig(**{**QUICK, **changes}), resume=resume)


def test_text_conditional(photos, tmp_path):
    pipe, model = train(tmp_path, open_source(photos, 20))
    assert model.config.condition["name"] == "prompt_embeds"
    loaded = load_discriminator(tmp_path)
    assert loaded.config.trained_on["samples"] == {"steps": [2], "sampler": None, "guidance_scale": 1.0}
    log = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4]
    assert {"loss", "sigma 0.1", "sigma 10"} <= set(log[-1]["validation"])
    arguments = {"seeds": [1], "num_inference_steps": 2, "output_type": "latent"}
    guided = pipe("a red seven", guidance=DiscriminatorGuidance(loaded), **arguments).images
    assert not torch.equal(guided, pipe("a red seven", **arguments).images)


def test_learns_what_goes_with_which_prompt(photos, tmp_path):
    """On a noisy classifier, whose trunk and heads are copied and stay as they are."""
    torch.manual_seed(0)
    classifier = NoisyClassifier({"color": ["red", "blue"]}, (4, 8, 8), HEAD)
    classifier.save_pretrained(tmp_path / "c")
    source = open_source(photos, 20)
    pipe, _ = train(tmp_path / "d", source, extractor=str(tmp_path / "c"), sigmas=(0.001, 0.01))
    loaded = load_discriminator(tmp_path / "d")
    for name, value in classifier.trunk.state_dict().items():
        torch.testing.assert_close(loaded.extractor.state_dict()[name], value, rtol=1e-3, atol=1e-4)  # saved in half precision
    assert DiscriminatorGuidance(loaded).matching > 0
    assert (tmp_path / "d" / "training" / "matching" / "checkpoint.pt").exists()
    arguments = {"seeds": [1], "num_inference_steps": 2, "output_type": "latent"}
    one, other = (pipe("a red seven", guidance=DiscriminatorGuidance(loaded, matching=k), **arguments).images for k in (0.0, 5.0))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("family", "name"), [("dit", "class_labels"), ("ddpm", None)])
def test_class_conditional_and_unconditional(photos, tmp_path, family, name):
    """An unconditional model takes nothing from the pictures' captions; a class-conditional one takes their classes."""
    source = open_source(photos, 20)
    labels = None if name is None else [int(label == "one") for label in source.labels]
    import dataclasses

    source = dataclasses.replace(source, captions=None, labels=labels)
    _, model = train(tmp_path, source, family)
    assert (model.config.condition or {}).get("name") == name


def test_interrupted_runs_go_on_and_end_the_same(photos, tmp_path):
    source = open_source(photos, 20)
    _, whole = train(tmp_path / "whole", source)
    train(tmp_path / "parts", source)
    samples = tmp_path / "parts" / "training" / "samples"
    kept = samples / "fake-00000000.safetensors"
    modified = kept.stat().st_mtime_ns
    (samples / "real-00000000.safetensors").unlink()
    (tmp_path / "parts" / "training" / "checkpoint.pt").unlink()
    _, resumed = train(tmp_path / "parts", source, resume=True)
    assert kept.stat().st_mtime_ns == modified
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_samples_made_otherwise_are_refused(photos, tmp_path):
    source = open_source(photos, 20)
    train(tmp_path, source)
    with pytest.raises(ValueError, match=r"already holds samples\. Use --resume"):
        train(tmp_path, source)
    with pytest.raises(ValueError, match="made with another steps"):
        train(tmp_path, source, resume=True, steps=(3,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 3}, "count=3 with held_out=0.1 leaves nothing"),
        ({"steps": ()}, "at least one positive number"),
        ({"sampler": "eular"}, "eular"),
        ({"sigmas": (2.0, 1.0)}, "no interval"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**{**QUICK, **changes})


def test_command_line(photos, tiny_folder, tmp_path):
    line = ["train", "discriminator", "--model", tiny_folder, "--data", photos, "--out", tmp_path / "d"]
    plan = json.loads(genkit(*line, "--dry-run", "--json").stdout)
    assert plan["steps"] == [30]
    assert not (tmp_path / "d").exists()
    genkit(*line, *LINE)
    load_discriminator(tmp_path / "d")
    spec = f"discriminator:model={tmp_path / 'd'},scale=2"
    genkit("sample", "a red seven", "--model", tiny_folder, "--guidance", spec, "--steps", 2, "--out", tmp_path / "out", "--quiet")
    assert list((tmp_path / "out").glob("*.png"))
    result = genkit("sample", "a", "--guidance", spec, "--steps", 2, "--out", tmp_path / "out", code=2)
    assert "was trained on" in result.output
    assert "'digits'" in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--steps", "ten"], "--steps 'ten' is not a list"),
        (["--data", "nowhere"], "There is no data 'nowhere'"),
        (["--model", "digitz"], "Did you mean 'digits'"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_bad_command_lines(line, message, tmp_path):
    result = genkit("train", "discriminator", "--out", tmp_path, *line, code=2)
    assert message in result.output


def test_two_processes_share_the_samples(photos, tiny_folder, tmp_path):
    line = ["train", "discriminator", "--model", str(tiny_folder), "--data", str(photos), "--device", "cpu", *LINE]
    line[line.index("20")] = "404"  # three files of samples
    environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    code, _, stderr = two_processes([*line, "--out", str(tmp_path / "two")], **environment)
    assert code == 0, stderr
    genkit(*line, "--out", tmp_path / "one")
    for name in ("fake-00000000", "fake-00000200", "fake-00000400", "real-00000200"):
        one, two = (load_file(tmp_path / n / "training" / "samples" / f"{name}.safetensors")["samples"] for n in ("one", "two"))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    load_discriminator(tmp_path / "two")
    log = tmp_path / "two" / "training" / "log1.jsonl"
    assert log.exists()  # the second process trained, too
