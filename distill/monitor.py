"""What a person sees of a distillation: figures, previews beside the teacher's pictures, and warnings in plain language."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from genkit import noise as noises
from genkit.console import console
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.modes import evaluating
from genkit.distill.masks import lower_half, masked
from genkit.distill.path import renoise, steps_of
from genkit.images import contact_sheet, save_png

if TYPE_CHECKING:
    from genkit.distill.trainer import DistillTrainer

WINDOW = 200  # rounds that a warning looks back on
# A discriminator that is right more often than this, or nearly never, teaches little. (The specs of the field say .55 to .8.)
WINS, DIES = 0.97, 0.505
LIMP = 1e-2  # pull of a head that is as good as constant; the margin of the hinge is 1
PREVIEW_STEPS = (1, 2, 4)
TEACHER_STEPS = 30


class Monitor:
    """Logs a trainer's figures to `log.jsonl` and to accelerate's trackers, and draws its previews.

    As a context manager it holds the log open.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self.trainer = trainer
        self.history: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.warnings: list[str] = []
        self._log: TextIO | None = None
        self._teacher_pictures: Tensor | None = None

    @property
    def folder(self) -> Path:
        return self.trainer.run.folder

    def __enter__(self) -> Monitor:
        if self.trainer.ranks.leads:
            self._log = open(self.folder / "log.jsonl", "a", encoding="utf-8")
        if self.trainer.config.trackers:
            settings = {
                k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in self.trainer.config.to_json().items()
            }
            self.trainer.accelerator.init_trackers("tracker", config=settings)
        self._began, self._began_step = time.monotonic(), self.trainer.step
        self._told = self.trainer.step > 0  # what attention is computed with, in the first line of a run
        return self

    def __exit__(self, *exception: object) -> None:
        if self._log is not None:
            self._log.close()
        if self.trainer.config.trackers:
            self.trainer.accelerator.end_training()

    def record(self, figures: dict[str, float]) -> None:
        """Keep the figures of a round; write them every `log_every` rounds."""
        self.history.append(figures)
        trainer = self.trainer
        if trainer.step % trainer.config.log_every and trainer.step != trainer.config.steps:
            return
        rounds = trainer.step - self._began_step
        figures = figures | {
            "lr": trainer.schedules[0].get_last_lr()[0], "disc_lr": trainer.schedules[1].get_last_lr()[0],
            "ema_decay": trainer.average.decay_of(trainer.average.updates),
            "samples_per_second": rounds * trainer.config.batch_size / (time.monotonic() - self._began),
        }  # fmt: skip
        if trainer.accelerator.device.type == "cuda":
            figures["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._log is not None:
            line: dict[str, Any] = {"step": trainer.step} | {k: round(v, 6) for k, v in figures.items()}
            line |= {} if self._told else {"attention": trainer.proof.to_dict()}
            self._told = True
            print(json.dumps(line), file=self._log, flush=True)
        if trainer.config.trackers:
            trainer.accelerator.log(figures, step=trainer.step)
        for warning in judge_health(list(self.history), self.trainer.discriminator.source.names):
            self._warn(warning)

    def summary(self) -> str:
        """One line for the progress bar."""
        last = self.history[-1] if self.history else {}
        named = {"d_loss": "D", "g_loss": "G", "g_reconstruction": "rec"}
        return "distilling  " + "  ".join(f"{short} {last[name]:.3f}" for name, short in named.items() if name in last)

    def _warn(self, text: str) -> None:
        """Each kind of warning once; its figures may change."""
        kind = text.partition(":")[0]
        if not any(warning.startswith(kind) for warning in self.warnings):
            self.warnings.append(text)
            if self.trainer.ranks.leads:
                console.print(f"[yellow]Round {self.trainer.step}: {text}[/yellow]", highlight=False)

    @torch.no_grad()
    def preview(self) -> Path | None:
        """Pictures of the averaged student at 1, 2 and 4 steps from fixed noise, under the teacher's, or under those whose lower
        half it paints; `previews/step-N.png`."""
        trainer, denoiser, rows = self.trainer, self.trainer.teacher.denoiser, self._rows()
        if not rows:
            return None
        x0, cond = self._items(denoiser)
        mask = None
        if trainer.config.task == "inpaint":
            mask = lower_half(len(x0), x0.shape[-2:], x0.device)
            cond = masked(cond, x0, mask, denoiser)
            pictures = {"data": denoiser.decode(x0)}
        else:
            self.draw_teacher()
            pictures = {} if self._teacher_pictures is None else {f"teacher, {TEACHER_STEPS} steps": self._teacher_pictures}
        with trainer.averaged(), evaluating(trainer.student.network):
            for steps in [n for n in PREVIEW_STEPS if n <= len(trainer.config.levels)]:
                with trainer.autocast():
                    samples = student_samples(trainer, x0.shape, cond, steps)
                pictures[f"{steps} step{'s' * (steps > 1)}"] = self._painted(samples, x0, mask)
        captions = trainer.draws.data.prompts or [str(label) for label in trainer.draws.data.labels or []]
        sheet = contact_sheet(
            [VaeImageProcessor().postprocess(row.cpu()) for row in pictures.values()], list(pictures),
            [captions[row] for row in rows] if captions else [""] * len(rows),
        )  # fmt: skip
        file = self.folder / "previews" / f"step-{trainer.step:06d}.png"
        file.parent.mkdir(exist_ok=True)
        save_png(sheet, file)
        return file

    def _rows(self) -> list[int]:
        """The rows of the data that are shown, of one shape; none where another process shows them."""
        if not self.trainer.ranks.leads:
            return []
        return next(iter(self.trainer.draws.data.buckets.values()))[: self.trainer.config.preview_count]

    def _items(self, denoiser: Denoiser) -> tuple[Tensor, Cond]:
        """Latents and conditions of these rows."""
        data, rows = self.trainer.draws.data, self._rows()
        return data.latents(rows).to(denoiser.device), data.condition(denoiser, rows)

    def _painted(self, samples: Tensor, x0: Tensor, mask: Tensor | None) -> Tensor:
        """Pictures of samples, outside of a mask those of x0."""
        return self.trainer.teacher.denoiser.decode(samples if mask is None else mask * samples + (1 - mask) * x0)

    @torch.no_grad()
    def draw_teacher(self) -> None:
        """Draw the teacher's row of the previews, once, while the trainer still has the whole teacher."""
        from genkit.sampling import sample

        denoiser = self.trainer.whole
        if denoiser is None or self._teacher_pictures is not None or self.trainer.config.task == "inpaint" or not self._rows():
            return
        x0, cond = self._items(denoiser)
        scheduler = type(denoiser.pipe.scheduler).from_config(denoiser.pipe.scheduler.config)
        denoiser.set_timesteps(scheduler, TEACHER_STEPS, x0.shape[1:], denoiser.device)
        start = noises.normal(range(len(x0)), x0.shape[1:]).to(denoiser.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        latents = sample(
            denoiser, scheduler, start, cond.without_concat(), generator=noises.generators(range(len(x0)), noises.SAMPLER),
            guidance_scale=self.trainer.draws.data.record.get("guidance_scale") or 1.0,
        )  # fmt: skip
        self._teacher_pictures = denoiser.decode(latents)


@torch.no_grad()
def student_samples(trainer: DistillTrainer, shape: Any, cond: Any, steps: int) -> Tensor:
    """Clean samples (B, c, h, w) of the student's present weights in a number of steps; sample i has the noise of seed i."""
    denoiser = trainer.teacher.denoiser

    def noise(step: int) -> Tensor:
        stream = noises.INITIAL if step == 0 else noises.SAMPLER
        key = 0 if step == 0 else step << 32
        return noises.normal([key | i for i in range(shape[0])], shape[1:], stream).to(denoiser.device)

    levels = steps_of(trainer.config.levels, steps)
    return renoise(lambda x, level: trainer.student(x, level, cond.tensors), trainer.teacher.path, levels, noise)


def judge_health(history: list[dict[str, float]], taps: list[str]) -> list[str]:
    """What is wrong with the balance of the two networks, in plain language; nothing before there are WINDOW rounds.

    Args:
        history: figures of rounds, the last at the end.
        taps: names of the heads.
    """
    if len(history) < WINDOW or "accuracy/0" not in history[-1]:
        return []
    means = [sum(h[f"accuracy/{k}"] for h in history) / len(history) for k in range(len(taps))]
    found = []
    if min(means) > WINS:
        found.append(
            f"The discriminator wins: all heads tell real from fake {min(means):.0%} of the time or more, so the student learns "
            "little. Lower --disc-lr, raise --r1, use fewer taps, or more noise (the mean of --disc-noise)."
        )
    gaps = [sum(h[f"logit_real/{k}"] - h[f"logit_fake/{k}"] for h in history) / len(history) for k in range(len(taps))]
    pulls = [sum(h[f"pull/{k}"] for h in history) / len(history) for k in range(len(taps))]
    # Chance alone is what a student as good as the data brings heads to: they still react to what they see, and pull.
    if max(means) < DIES and max(gaps) < 0.01 and max(pulls) < LIMP:
        found.append(
            "The discriminator has died: no head tells real from fake any better than chance, and none reacts to what it sees (the "
            f"strongest pull is {max(pulls):.1g}). Raise --disc-lr, lower --r1, use more taps, or less noise (the mean of "
            "--disc-noise)."
        )
    return found
