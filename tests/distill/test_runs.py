"""Folders of distillations: checkpoints that are whole or not there, and runs that go on as if they had never stopped."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genkit.denoisers import Denoiser
from genkit.distill.trained import TrainedRun
from genkit.distill.trainer import DistillTrainer
from tests.distill.tiny_runs import data_of, denoiser_of, settings, trainer_of

FAMILY = "sd3"
ROUNDS = {"steps": 4, "checkpoint_every": 2, "batch_size": 2}
ADD = {"method": "add", "encoder": "digits-classifier", "mismatched": False, "disc_condition": ("text", "image")}


def state(trainer: DistillTrainer) -> dict[str, Any]:
    """Everything that a run is, flat."""
    found: dict[str, Any] = {f"student.{k}": v for k, v in trainer.student.state_dict().items()}
    found |= {f"heads.{k}": v for k, v in trainer.discriminator.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in enumerate(trainer.average.shadow)} | {"ema.steps": trainer.average.updates}
    for name, optimizer in (("student", trainer.student_optimizer), ("heads", trainer.heads_optimizer)):
        for i, entry in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}.{k}": v for k, v in entry.items()}
        found[f"{name}.lr"] = optimizer.param_groups[0]["lr"]
    return found | {"step": trainer.step}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key] for key, value in one.items()
    )


def log(folder: Path) -> list[dict[str, float]]:
    """Lines of a log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("samples_per_second", "seconds")} for line in lines]


def in_round(trainer: DistillTrainer, number: int, action: Callable[[], None]) -> None:
    """Do something when the student is first called in a round."""

    def act(module: torch.nn.Module, args: Any) -> None:
        if trainer.step == number - 1:
            hook.remove()
            action()

    hook = trainer.student.register_forward_pre_hook(act)


def made(folder: Path, **changes: Any) -> DistillTrainer:
    """A trainer of the run in a folder; another one of the same folder is what a new process would build."""
    return trainer_of(folder, FAMILY, **changes)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 rounds with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("done")
    made(folder, **ROUNDS).fit()
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    shutil.copytree(done, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 2},
        {"accumulation": 2, "lr_scheduler": "cosine", "lr_warmup": 1, "warmup_probs": (0.0, 0.0, 0.5, 0.5), "warmup_steps": 3},
        {**ADD, "distillation": 1.0},
    ],
)
def test_a_resumed_run_is_an_unbroken_one(changes, tmp_path):
    """Weights, average, optimizers, schedules and log, bit by bit; from a round that was no multiple of anything."""
    unbroken = made(tmp_path / "a", **ROUNDS | changes)
    unbroken.fit()
    broken = made(tmp_path / "b", **ROUNDS | changes)
    in_round(broken, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    broken.fit()
    assert broken.step == 3
    resumed = made(tmp_path / "b", **ROUNDS | changes)
    resumed.fit(resume="latest")
    assert equal(state(resumed), state(unbroken))
    assert log(tmp_path / "b" / "run") == log(tmp_path / "a" / "run")
    assert [entry["step"] for entry in log(tmp_path / "b" / "run")] == [1, 2, 3, 4]


def test_a_run_goes_on_from_the_checkpoint_that_is_named(copied):
    unbroken = made(copied, **ROUNDS)
    unbroken.fit(resume="latest")  # has nothing left to do
    assert unbroken.step == 4
    with open(copied / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "d_loss": 1')  # as a crash leaves it
    shutil.rmtree(copied / "run" / "checkpoint-4")
    resumed = made(copied, **ROUNDS)
    resumed.fit(resume="checkpoint-2")
    assert equal(state(resumed), state(unbroken))
    assert [entry["step"] for entry in log(copied / "run")] == [1, 2, 3, 4]


def test_a_continuation_may_be_longer(copied):
    trainer = made(copied, **ROUNDS | {"steps": 5, "log_every": 2, "checkpoints_limit": 2})
    trainer.fit(resume="latest")
    assert trainer.step == 5
    assert [p.name for p in trainer.run.checkpoints()] == ["checkpoint-4", "checkpoint-5"]


def test_latest_starts_where_there_is_nothing_yet(tmp_path):
    """So that a job that is killed at any time can be repeated as it is."""
    trainer = made(tmp_path, steps=1)
    trainer.run.open(trainer, None)  # and is killed before the first checkpoint
    trainer = made(tmp_path, steps=1)
    trainer.fit(resume="latest")
    assert trainer.step == 1


@pytest.mark.parametrize(
    ("resume", "changes", "message"),
    [
        (None, {}, "already holds a run. Go on with it (--resume latest), or use another --out."),
        (
            "latest",
            {"lr": 2e-3, "gan": "softplus"},
            "otherwise: it has gan 'hinge', lr 0.001, but here it is gan 'softplus', lr 0.002.",
        ),
        ("latest", {"levels": (1.0, 0.5)}, "it has levels [1.0, 0.75, 0.5, 0.25], but here it is levels [1.0, 0.5]."),
        ("latest", {"count": 12}, "it has data '16 items, "),
        ("checkpoint-3", {}, "There is no checkpoint 'checkpoint-3' in"),
        ("checkpoint-3", {}, "There are: checkpoint-2, checkpoint-4."),
        ("/nowhere", {}, "There is no checkpoint '/nowhere' in"),
    ],
)
def test_runs_that_cannot_be_continued(resume, changes, message, copied):
    if "count" in changes:
        shutil.rmtree(copied / "data")
    trainer = made(copied, **ROUNDS | changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer.fit(resume=resume)
    assert [p.name for p in trainer.run.checkpoints()] == ["checkpoint-2", "checkpoint-4"]


def test_a_run_on_other_data_of_the_same_size_is_refused(copied):
    shutil.rmtree(copied / "data")
    denoiser = denoiser_of(FAMILY)
    data = data_of(denoiser, copied / "data")
    data.record["sampler"] = "euler"
    trainer = DistillTrainer(denoiser, data, settings(**ROUNDS), copied / "run")
    with pytest.raises(
        ValueError, match=r"was made otherwise: it has data '16 items, [0-9a-f]{12}', but here it is data '16 items, [0-9a-f]{12}'"
    ):
        trainer.fit(resume="latest")


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("student/diffusion_pytorch_model.safetensors", 0.5),
        ("heads.safetensors", 0.0),
        ("optimizers.pt", 0.0),
        ("optimizers.pt", 0.5),
        ("state.json", 0.5),
    ],
)
def test_a_truncated_checkpoint_is_named(name, keep, copied):
    file = copied / "run" / "checkpoint-4" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    trainer = made(copied, **ROUNDS)
    with pytest.raises(ValueError, match=r"checkpoint-4' cannot be read .*Remove it to go on from an earlier one"):
        trainer.fit(resume="latest")


def test_a_checkpoint_without_a_file_is_named(copied):
    shutil.rmtree(copied / "run" / "checkpoint-4" / "student_ema")
    with pytest.raises(ValueError, match=r"The checkpoint '.*checkpoint-4' cannot be read"):
        made(copied, **ROUNDS).fit(resume="latest")


def test_only_so_many_checkpoints_are_kept(tmp_path):
    trainer = made(tmp_path, steps=5, checkpoint_every=1, checkpoints_limit=2, batch_size=2)
    trainer.fit()
    assert [p.name for p in trainer.run.checkpoints()] == ["checkpoint-4", "checkpoint-5"]
    everything = made(tmp_path / "all", steps=5, checkpoint_every=1, checkpoints_limit=0, batch_size=2)
    everything.fit()
    assert len(everything.run.checkpoints()) == 5


def test_a_full_disk_loses_nothing_that_is_saved(tmp_path):
    """A limit on the size of files, at which writing fails as on a full disk: the networks are larger, the log is not."""
    trainer = made(tmp_path, steps=4, checkpoint_every=2, batch_size=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    in_round(trainer, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(OSError, match=r"checkpoint-4' could not be written .*Is the disk full\?"):
            trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "config.json", "log.jsonl"]
    resumed = made(tmp_path, steps=4, checkpoint_every=2, batch_size=2)
    resumed.fit(resume="latest")
    assert equal(state(resumed), state(trainer))


def test_what_a_killed_process_left_is_cleared(copied):
    """A checkpoint in the making is under another name, which is none to resume from."""
    left = copied / "run" / ".checkpoint-9.123.tmp"
    shutil.copytree(copied / "run" / "checkpoint-4", left)
    (left / "state.json").unlink()
    trainer = made(copied, **ROUNDS)
    trainer.fit(resume="latest")
    assert trainer.step == 4
    assert not left.exists()


def test_checkpoints_load_as_diffusers_does(done, tmp_path):
    """The student by `from_pretrained`, its average beside it, and a LoRA by `load_lora_weights`."""
    trainer = made(done, **ROUNDS)
    trainer.run.open(trainer, "latest")
    network = type(trainer.student.network)
    student, average = (network.from_pretrained(done / "run" / "checkpoint-4" / name) for name in ("student", "student_ema"))
    assert all(torch.equal(v, trainer.student.network.state_dict()[k]) for k, v in student.state_dict().items())
    assert all(torch.equal(p, s) for p, s in zip(average.parameters(), trainer.average.shadow, strict=True))
    assert TrainedRun(done / "run").checkpoints() == [2, 4]
    adapted = made(tmp_path, lora_rank=2, batch_size=2, lr=0.1)
    adapted.fit()
    host = denoiser_of(FAMILY).pipe
    host.load_lora_weights(tmp_path / "run" / "checkpoint-2" / "student")
    draw = adapted.draws(0)
    x, level = adapted.teacher.path.add_noise(draw.x0, draw.eps, draw.u)
    with torch.no_grad():
        expected, plain = adapted.student(x, level, draw.cond.tensors), denoiser_of(FAMILY)(x, level, draw.cond).x0
        assert torch.allclose(Denoiser.of(host)(x, level, draw.cond).x0, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_the_settings_are_in_the_folder(done):
    content = json.loads((done / "run" / "config.json").read_text())
    assert content["levels"] == [1.0, 0.75, 0.5, 0.25]
    assert content["data"].startswith("16 items, ")
    assert sorted(p.name for p in (done / "run" / "checkpoint-4").iterdir()) == [
        "heads.safetensors",
        "optimizers.pt",
        "state.json",
        "student",
        "student_ema",
    ]
