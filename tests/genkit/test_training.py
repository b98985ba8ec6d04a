"""`genkit zoo train`: the loop is resumable and exact, and each script ends with a folder that loads."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from genkit.classifiers import AttributeClassifier
from genkit.data import digits as data
from genkit.training import TrainConfig, fit
from genkit.zoo.training import autoencoder, classifier, digits
from genkit.zoo.training.tokenizer import build_tokenizer


def regression(model, generator, step):
    x = torch.randn(16, 3, generator=generator)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(folder, loss=regression, steps=60, resume=False):
    torch.manual_seed(0)
    config = TrainConfig(steps=steps, batch_size=16, lr=0.05, warmup=5, bf16=False, ema_decay=0.9)
    return fit(nn.Linear(3, 1), loss, config, folder, name="test", resume=resume)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole")

    def stops(model, generator, step):
        if step == 31:
            raise KeyboardInterrupt
        return regression(model, generator, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stops)
    resumed = train(tmp_path / "parts", resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_log_has_each_step_once_after_a_kill_and_after_a_new_start(tmp_path):
    """A kill can come after a line and before its checkpoint, or within a line; a crash of the machine can leave anything."""

    def logged() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    def stops(model, generator, step):
        if step == 80:
            raise KeyboardInterrupt
        return regression(model, generator, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stops, steps=150)
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b'{"step": 100, "loss": 1.0}\n\xff\x00\x00\n{"step": 15')
    train(tmp_path, steps=150, resume=True)
    assert logged() == [50, 100, 150]
    train(tmp_path, steps=100)
    assert logged() == [50, 100]


def test_loop_learns_logs_and_stops_on_nan(tmp_path):
    model = train(tmp_path / "a", steps=200)
    torch.testing.assert_close(model.weight, torch.ones(1, 3), atol=0.05, rtol=0)
    lines = (tmp_path / "a" / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 200
    with pytest.raises(FloatingPointError, match="step 0"):
        train(tmp_path / "b", lambda model, generator, step: model(torch.full((1, 3), float("nan"))).sum())
    with pytest.raises(ValueError, match="steps and batch_size"):
        TrainConfig(steps=0)


def test_classifier_script(tmp_path):
    classifier.train("digits-classifier", tmp_path, steps=2)
    model = AttributeClassifier.from_pretrained(tmp_path, dtype=torch.float32)
    batch = data.draw("test", 4)
    assert {k: v.shape[1] for k, v in model.attributes(batch.images).items()} == {"digit": 10, "ink": 8, "paper": 8}
    assert model(batch.images).shape == (4, 10)
    with pytest.raises(ValueError, match="'font'"):
        model(batch.images, attribute="font")


def test_digits_script_makes_a_stock_pipeline(tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(digits, "POOL", 4096)
    autoencoder.train(tmp_path / "vae", steps=2)
    digits.train(tmp_path, steps=2)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red seven", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 32, 32)


def test_tokenizer_keeps_words_whole_and_takes_any_text():
    tokenizer = build_tokenizer(data.WORDS, 32)
    assert len(tokenizer("a red seven on a yellow background").input_ids) == 9
    text = "A photograph, naïve & 42!"
    ids = tokenizer(text, padding="max_length", max_length=32, truncation=True).input_ids
    assert len(ids) == 32
    assert tokenizer.unk_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(" ", "")


def test_the_best_by_validation_is_kept_and_patience_ends_the_run(tmp_path):
    """Validation rewards weights near 1 and gets worse from there: the run stops early, and gives back the best."""
    seen = []

    def validate(model):
        seen.append(model.weight.clone())
        return {"loss": (len(seen) - 3) ** 2, "other": 1.0}

    torch.manual_seed(0)
    config = TrainConfig(steps=500, batch_size=16, lr=0.05, validate_every=10, patience=2, bf16=False, ema_decay=0)
    model = fit(nn.Linear(3, 1), regression, config, tmp_path, name="test", validate=validate)
    assert len(seen) == 5  # best at the third, then two without a better one
    assert torch.equal(model.weight, seen[2])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["validation"] == {"loss": 4, "other": 1}
    again = fit(nn.Linear(3, 1), regression, config, tmp_path, name="test", validate=validate, resume=True)
    assert torch.equal(again.weight, seen[2])
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"validate_every": 0}, "validate_every=0"), ({"patience": -1}, "patience=-1"), ({"ema_decay": 1.0}, "ema_decay=1.0")],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **arguments)


def test_noisy_classifier_and_discriminator_scripts(tmp_path):
    from genkit.guidance import load_discriminator, load_noisy_classifier
    from genkit.levels import Level
    from genkit.zoo.training import discriminator, noisy_classifier

    noisy_classifier.train(tmp_path / "c", steps=2, pool=32)
    classifier = load_noisy_classifier(tmp_path / "c")
    assert classifier(torch.zeros(2, 4, 8, 8), Level(1.0, 0.5, 0)).shape == (2, 10)
    assert classifier.config.trained_on["name"] == "digits"
    discriminator.train(tmp_path / "d", steps=2, count=20)
    assert load_discriminator(tmp_path / "d").config.trained_on["samples"]["steps"] == [10, 30]
