"""The folder of a distillation: its settings, and checkpoints that are there whole or not at all.

    RUN/config.json                     settings, and what the data was
    RUN/log.jsonl                       figures
    RUN/checkpoint-N/student/           after N rounds: the network in diffusers' layout, or pytorch_lora_weights.safetensors
                    /student_ema/       the average of its weights
                    /heads.safetensors  the discriminator's heads
                    /optimizers.pt      both optimizers and learning-rate schedules
                    /state.json         rounds done

A checkpoint is written under another name, flushed to the disk and renamed. Randomness depends on (seed, round) alone, so there is
no state of it to keep.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from genkit.checkpoints import load_pt
from genkit.denoisers.base import network_name
from genkit.distill.config import FREE, DistillConfig
from genkit.distill.shards import difference, identity, settings_of
from genkit.distill.trained import LORA_FILE, checkpoint_folders, load_weights
from genkit.files import prepare_folder, shorten_log, write_atomic

if TYPE_CHECKING:
    from genkit.distill.trainer import DistillTrainer


class Run:
    """A run's folder.

    Args:
        leads: whether this process writes.
    """

    def __init__(self, folder: Path, config: DistillConfig, *, leads: bool = True) -> None:
        self.folder, self.config, self.leads = folder, config, leads

    def open(self, trainer: DistillTrainer, resume: str | Path | None) -> None:
        """Start a run in the folder, or go on with the one that is there; "latest" starts where there is no checkpoint yet.

        Raises:
            ValueError: a run is there and `resume` is None; or it was made with other settings; or there is no such checkpoint.
        """
        prepare_folder(self.folder)
        file = self.folder / "config.json"
        data = trainer.draws.data
        settings = self.config.to_json() | {"data": f"{len(data)} items, {identity(settings_of(data.record))}"}
        require_same_run(self.folder, settings, resume=resume is not None, option="--resume latest", free=FREE)
        checkpoint = None if resume is None else self._chosen(resume)
        trainer.ranks.wait()
        if self.leads:
            for left in self.folder.glob(".checkpoint-*.tmp"):  # by a process that was killed while it wrote
                shutil.rmtree(left)
            write_atomic(file, (json.dumps(settings, indent=2) + "\n").encode())
        if checkpoint is not None:
            self._restore(trainer, checkpoint)
        if self.leads:
            shorten_log(self.folder / "log.jsonl", trainer.step)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, the oldest first."""
        return list(checkpoint_folders(self.folder).values())

    def save(self, trainer: DistillTrainer) -> None:
        """Write the checkpoint of the rounds that are done, if it is not there; then drop the oldest beyond the limit.

        Raises:
            OSError: it could not be written; earlier checkpoints are as they were.
        """
        target = self.folder / f"checkpoint-{trainer.step}"
        if self.leads and not target.exists():
            temporary = self.folder / f".{target.name}.{os.getpid()}.tmp"
            try:
                temporary.mkdir()
                self._write(trainer, temporary)
                _flush(temporary)
                os.replace(temporary, target)
            except (SafetensorError, RuntimeError) as error:
                # What safetensors and torch.save raise when the disk is full.
                raise OSError(f"The checkpoint {str(target)!r} could not be written ({error}). Is the disk full?") from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            limit = self.config.checkpoints_limit
            for old in self.checkpoints()[:-limit] if limit else []:
                shutil.rmtree(old)
        trainer.ranks.wait()

    def _write(self, trainer: DistillTrainer, folder: Path) -> None:
        _save_student(trainer, folder / "student")
        with trainer.averaged():
            _save_student(trainer, folder / "student_ema")
        heads = {name: value.contiguous() for name, value in trainer.discriminator.state_dict().items()}
        save_file(heads, folder / "heads.safetensors")
        state = {
            "student": trainer.student_optimizer.state_dict(), "heads": trainer.heads_optimizer.state_dict(),
            "schedules": [schedule.state_dict() for schedule in trainer.schedules],
            "ema_steps": trainer.average.updates,
        }  # fmt: skip
        torch.save(state, folder / "optimizers.pt")
        (folder / "state.json").write_text(json.dumps({"step": trainer.step}) + "\n", encoding="utf-8")

    def _restore(self, trainer: DistillTrainer, folder: Path) -> None:
        device = trainer.teacher.denoiser.device
        try:
            _load_student(trainer, folder / "student_ema")
            averaged = [p.detach().clone() for p in trainer.student.trained()]
            _load_student(trainer, folder / "student")
            trainer.discriminator.load_state_dict(load_file(folder / "heads.safetensors", device=str(device)))
            state = load_pt(folder / "optimizers.pt", device)
            trainer.step = int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The checkpoint {str(folder)!r} cannot be read ({reason}). Remove it to go on from an earlier one."
            ) from error
        trainer.student_optimizer.load_state_dict(state["student"])
        trainer.heads_optimizer.load_state_dict(state["heads"])
        for schedule, content in zip(trainer.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(content)
        trainer.average.reset(averaged)
        trainer.average.updates = state["ema_steps"]

    def _chosen(self, resume: str | Path) -> Path | None:
        found = self.checkpoints()
        if str(resume) == "latest":
            return found[-1] if found else None
        wanted = self.folder / str(resume) if not Path(resume).is_dir() else Path(resume)
        if wanted not in found and not wanted.is_dir():
            names = ", ".join(p.name for p in found) or "none"
            raise ValueError(f"There is no checkpoint {str(resume)!r} in {str(self.folder)!r}. There are: {names}.")
        return wanted


def require_same_run(
    folder: Path, settings: dict[str, Any], *, resume: bool, option: str = "--resume", free: Sequence[str] = ()
) -> None:
    """Refuse a folder whose `config.json` is of a run that is not to be resumed, or of other settings.

    Args:
        resume: whether a run that is there is to go on.
        option: of the command that makes it go on, for the message.
        free: names of settings that may differ.

    Raises:
        ValueError: such a folder; the message names the difference.
    """
    file = folder / "config.json"
    if not file.exists():
        return
    if not resume:
        raise ValueError(f"{str(folder)!r} already holds a run. Go on with it ({option}), or use another --out.")
    differs = difference(json.loads(file.read_text(encoding="utf-8")), settings, free)
    if differs:
        raise ValueError(f"The run in {str(folder)!r} was made otherwise: {differs}. Use the same settings, or another --out.")


def _save_student(trainer: DistillTrainer, folder: Path) -> None:
    network = trainer.student.network
    if not trainer.student.lora_rank:
        network.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    folder.mkdir()
    prefix = network_name(trainer.teacher.denoiser.pipe)
    layers = {f"{prefix}.{name}": value.contiguous() for name, value in get_peft_model_state_dict(network).items()}
    adapter = next(iter(network.peft_config.values())).to_dict()
    metadata = {f"{prefix}.{name}": value for name, value in adapter.items()}
    save_file(layers, folder / LORA_FILE, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, default=_plain)})


def _load_student(trainer: DistillTrainer, folder: Path) -> None:
    network = trainer.student.network
    if not trainer.student.lora_rank:
        load_weights(folder, network)
        return
    from peft import set_peft_model_state_dict

    prefix = network_name(trainer.teacher.denoiser.pipe) + "."
    layers = {name.removeprefix(prefix): value for name, value in load_file(folder / LORA_FILE).items()}
    set_peft_model_state_dict(network, layers)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _flush(folder: Path) -> None:
    """Everything below a folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
