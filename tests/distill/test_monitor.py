"""What people see of a distillation: the log, previews, trackers, and warnings about the balance of the networks."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.distill import monitor as monitors
from genkit.distill.monitor import WINDOW, judge_health, student_samples
from genkit.distill.trainer import DistillTrainer
from tests.distill.tiny_runs import data_of, denoiser_of, settings, trainer_of


def history(accuracies: tuple[float, ...], gap: float = 0.0, rounds: int = WINDOW, pull: float = 0.5) -> list[dict[str, float]]:
    """Figures of rounds with heads of these accuracies, of this distance of mean logits, and of this pull on the student."""
    figures: dict[str, float] = {}
    for k, accuracy in enumerate(accuracies):
        figures |= {f"accuracy/{k}": accuracy, f"logit_real/{k}": gap / 2, f"logit_fake/{k}": -gap / 2, f"pull/{k}": pull}
    return [figures] * rounds


def test_a_balance_that_is_right_needs_no_words() -> None:
    assert judge_health(history((0.7, 0.6), 0.5), ["a", "b"]) == []
    # One head that wins and one that is dead leave something to learn from.
    assert judge_health(history((1.0, 0.7), 4.0), ["a", "b"]) == []
    assert judge_health(history((0.5, 0.7), 0.5), ["a", "b"]) == []


def test_a_discriminator_that_wins_is_named() -> None:
    (warning,) = judge_health(history((0.99, 1.0), 8.0), ["a", "b"])
    assert warning.startswith("The discriminator wins: all heads tell real from fake 99% of the time or more")
    assert "Lower --disc-lr" in warning


def test_a_dead_discriminator_is_named() -> None:
    (warning,) = judge_health(history((0.5, 0.501), pull=2e-3), ["a", "b"])
    assert warning.startswith("The discriminator has died: no head tells real from fake any better than chance, and none reacts")
    assert "the strongest pull is 0.002" in warning
    assert "Raise --disc-lr" in warning
    # At an accuracy of chance, means of logits that differ still teach.
    assert judge_health(history((0.5, 0.501), 0.5, pull=2e-3), ["a", "b"]) == []


def test_an_equilibrium_is_no_death() -> None:
    """Where fakes are as good as reals, heads are right half of the time, and still react to what they see."""
    assert judge_health(history((0.5, 0.501)), ["a", "b"]) == []


def test_heads_that_are_constant_pull_at_nothing(tmp_path):
    """Heads of an untrained discriminator react, those whose last layer is zero do not; the figures say which is which."""
    trainer = trainer_of(tmp_path, "sd3", spectral_norm=False, disc_lr=1e-12)
    alive = trainer._round()
    for head in trainer.discriminator.heads:
        torch.nn.init.zeros_(head.conv_out.weight)
    dead = trainer._round()
    assert all(alive[f"pull/{k}"] > monitors.LIMP for k in range(2))
    assert all(dead[f"pull/{k}"] < 1e-6 for k in range(2))


def test_nothing_is_said_too_early_or_without_a_discriminator() -> None:
    assert judge_health(history((1.0,), 8.0, WINDOW - 1), ["a"]) == []
    assert judge_health([{"g_loss": 1.0}] * WINDOW, ["a"]) == []


def test_a_run_whose_heads_learn_too_fast_says_so_once(tmp_path, monkeypatch, capsys):
    """Real data of stripes, which a student that does not move never draws."""
    monkeypatch.setattr(monitors, "WINDOW", 6)
    fast = {
        "disc_lr": 0.01,
        "lr": 1e-9,
        "spectral_norm": False,
        "head_width": 64,
        "taps": ("block.2",),
        "disc_noise": "uniform:0,.1",
    }
    trainer = trainer_of(tmp_path, "sd3", steps=32, mismatched=False, **fast)
    own = trainer.draws.data.latents
    stripes = 3 * torch.tensor([1.0, -1.0]).repeat(4)
    monkeypatch.setattr(trainer.draws.data, "latents", lambda rows: own(rows) * 0 + stripes)
    trainer.fit()
    assert len(trainer.monitor.warnings) == 1
    assert trainer.monitor.warnings[0].startswith("The discriminator wins")
    assert len(re.findall(r"Round \d+: The discriminator\s+wins", capsys.readouterr().err)) == 1


def test_the_log_has_every_figure(tmp_path):
    trainer = trainer_of(tmp_path, "sd3", steps=3, log_every=2, distillation=0.5, reconstruction=0.5, approximate_r1=1e-3)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]  # the last round always
    heads = {f"{name}/{k}" for name in ("accuracy", "logit_real", "logit_fake", "pull") for k in range(2)}
    losses = {"d_loss", "r1", "approximate_r1", "g_loss", "g_adversarial", "g_distillation", "g_reconstruction"}
    others = {"d_gradient", "g_gradient", "x0_std", "lr", "disc_lr", "ema_decay", "samples_per_second", "step"}
    assert set(lines[0]) == heads | losses | others | {"attention"}  # of the first round, by the first line
    assert all(0 <= line[f"accuracy/{k}"] <= 1 for line in lines for k in range(2))
    assert all(line["samples_per_second"] > 0 for line in lines)
    assert trainer.monitor.summary().startswith("distilling  D ")


@pytest.mark.parametrize("family", ["stable_diffusion", "dit"])
def test_previews_are_the_averaged_students_pictures_under_the_teachers(family, tmp_path):
    trainer = trainer_of(tmp_path, family, steps=2, preview_every=2, preview_count=3, levels=(1.0, 0.5), batch_size=2)
    trainer.fit()
    file = tmp_path / "run" / "previews" / "step-000002.png"
    with Image.open(file) as picture:
        first = np.asarray(picture.convert("RGB"))
    # Rows of the teacher, of 1 and of 2 steps (there are two levels), of three pictures of 16 pixels each.
    assert first.shape[0] > 3 * 16
    assert first.shape[1] > 3 * 16
    assert first.std() > 5
    before = [p.detach().clone() for p in trainer.student.trained()]
    average = [p.detach().clone() for p in trainer.average.shadow]
    trainer.monitor.preview()
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), first)
    for p, b, s, a in zip(trainer.student.trained(), before, trainer.average.shadow, average, strict=True):
        assert bool((p == b).all())
        assert bool((s == a).all())
    assert trainer.student.network.training


def test_a_preview_of_fewer_items_than_are_asked_for(tmp_path):
    denoiser = denoiser_of("ddpm")  # without captions
    data = data_of(denoiser, tmp_path / "data", 2, shapes=[(3, 8, 8), (3, 4, 8)])
    trainer = DistillTrainer(denoiser, data, settings(steps=1, batch_size=2, preview_every=1, preview_count=8), tmp_path / "run")
    trainer.fit()
    with Image.open(tmp_path / "run" / "previews" / "step-000001.png") as picture:
        picture.load()


def test_samples_are_functions_of_their_seeds(tmp_path):
    trainer = trainer_of(tmp_path, "pixart_sigma")
    rows = [0, 1, 2]
    x0, cond = trainer.draws.data.latents(rows), trainer.draws.data.condition(trainer.teacher.denoiser, rows)
    three, one = (student_samples(trainer, x0[:n].shape, cond[:n], 4) for n in (3, 1))
    assert three.shape == x0.shape
    assert np.allclose(three[:1], one, atol=1e-4)
    assert not np.allclose(student_samples(trainer, x0.shape, cond, 1), three, atol=1e-2)


def test_trackers_get_the_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, "sd3", steps=2, batch_size=2, trackers=("tensorboard",))
    trainer.fit()
    (file,) = (tmp_path / "run" / "tracker").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("d_loss")] == [1, 2]
