"""The trainer of ADD and LADD, on accelerate: rounds of two phases that cannot touch each other's weights.

    discriminator   zero all gradients; L_D; nothing but heads may have gradients; update the heads
    generator       zero all gradients; heads frozen; L_G; nothing but the student may have gradients; update student and EMA

(A public script lets the generator's gradients stay in the heads and adds the discriminator's to them, which cancels its loss on
fakes; the check at the end of each phase makes that impossible here.) A phase whose loss or gradient is not finite changes no
weight: it is tried again with other noise, on all processes alike, and after `retries` failures the run stops.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from torch import nn

from genkit import noise as noises
from genkit.attention.proof import Proof
from genkit.console import progress
from genkit.denoisers import Denoiser
from genkit.distill.average import Average
from genkit.distill.config import DistillConfig
from genkit.distill.data import LatentDataset
from genkit.distill.draws import Draw, Draws
from genkit.distill.monitor import Monitor
from genkit.distill.networks import Student, Teacher
from genkit.distill.optimizer import MomentumFreeAdamW
from genkit.distill.resident import in_dtype, without_encoders
from genkit.distill.rounds import Fakes, Figures, Rounds
from genkit.distill.runs import Run
from genkit.distill.setup import build_discriminator, feature_source
from genkit.distill.sources import FeatureSource, TeacherTaps
from genkit.distill.trained import start_from
from genkit.ranks import Ranks


class DistillTrainer:
    """Distils a denoiser into a few-step student.

    A trainer keeps of its teacher what rounds need: the blocks up to the deepest tap, in bfloat16 if that is what they compute in,
    and text encoders and VAE only while something has to be encoded or decoded. The rest is free once the caller lets go of it.

    Args:
        denoiser: the teacher, on the device of this process; its network is frozen in place.
        data: clean latents with conditions, of the teacher's latent space.
        config: everything else.
        folder: of the run: `config.json`, `checkpoint-N/`, `log.jsonl`, `previews/`.
        ranks: the processes that train together, after `Ranks.join`.
        source: of the discriminator's features, on the denoiser's device; by default the one that `config` names.

    Attributes:
        step: rounds done.
        student, discriminator: the trained networks, unwrapped.
        teacher: the frozen model, as far as it is kept.
        average: of the student's weights.

    Raises:
        ValueError: data, levels, taps or heads that do not fit the teacher, or each other.

    Example:
        >>> trainer = DistillTrainer(pipe.denoiser, open_data("data", pipe.denoiser), DistillConfig(steps=2000), Path("run"))
        >>> trainer.fit(resume="latest")
    """

    def __init__(
        self,
        denoiser: Denoiser,
        data: LatentDataset,
        config: DistillConfig,
        folder: Path,
        *,
        ranks: Ranks | None = None,
        source: FeatureSource | None = None,
    ) -> None:
        _refuse_plugins()
        self.config, self.ranks, self.step = config, ranks or Ranks(), 0
        torch.manual_seed(config.seed)
        self.whole: Denoiser | None = denoiser if config.preview_every else None  # until it has drawn its part of the previews
        encoded = data.encode_prompts(denoiser)
        self.draws = Draws(data, without_encoders(denoiser, text=not encoded, pictures=config.needs_pictures), config, self.ranks)
        self._make_networks(self.draws.denoiser, source)
        self.accelerator = Accelerator(
            mixed_precision="no",  # which accelerate fixes for the whole process; `autocast` is for a trainer
            log_with=list(config.trackers) or None,
            project_dir=str(folder),
            cpu=denoiser.device.type == "cpu",
            # A student's buffers are constants.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.run = Run(folder, config, leads=self.ranks.leads)
        self.monitor = Monitor(self)
        self._prepare()
        self._stopping = False

    def _make_networks(self, whole: Denoiser, source: FeatureSource | None) -> None:
        """Teacher, student and discriminator, from a teacher's whole network."""
        config = self.config
        # Autocast would cast frozen weights in each pass. A LoRA student has the same ones.
        working = in_dtype(whole, torch.bfloat16 if config.mixed_precision == "bf16" else None)
        start = working if config.lora_rank else whole  # all weights are trained in float32, from what they are in float32
        self.student = Student(Teacher(start), lora_rank=config.lora_rank, extra_channels=self.draws.extra_channels)
        if config.init:
            start_from(config.init, self.student.network)
        Teacher(working)  # frozen before its features are read
        if source is None:
            source = feature_source(working, self.draws, config)
            if isinstance(source, TeacherTaps) and not config.needs_output:
                working = source.strip()
        self.teacher, self.draws.denoiser = Teacher(working), working
        self.discriminator = build_discriminator(self.draws, config, source).to(working.device)
        if config.gradient_checkpointing:
            for network in (self.student.network, working.network):
                network.enable_gradient_checkpointing()

    def _prepare(self) -> None:
        config = self.config

        def adamw(parameters: Any, lr: float, decay: float) -> torch.optim.Optimizer:
            return MomentumFreeAdamW(parameters, lr=lr, weight_decay=decay)

        def schedule(optimizer: Any) -> Any:
            return get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup, num_training_steps=config.steps)

        optimizers = (
            adamw(self.student.trained(), config.learning_rate, config.weight_decay),
            adamw(self.discriminator.parameters(), config.disc_lr, 0.0),
        )
        self.schedules = [schedule(optimizer) for optimizer in optimizers]
        # One network with its optimizer at a time, as FSDP2 wants it. The teacher is not prepared: it has nothing to reduce.
        self.wrapped_student, self.student_optimizer = self.accelerator.prepare(self.student, optimizers[0])
        # Heads have a backward pass each, which DDP does not count as one; `_discriminator_phase` reduces.
        self.heads_optimizer = self.accelerator.prepare(optimizers[1])
        self.average = Average(self.student.trained(), config.ema, every=config.ema_every, host=config.ema_host)
        self.rounds = Rounds(self.teacher, self.wrapped_student, self.discriminator, config)

    def fit(self, resume: str | Path | None = None) -> None:
        """Train until `config.steps` rounds are done; on SIGTERM or Ctrl-C finish the round, save and return.

        Args:
            resume: "latest", a checkpoint of the folder, or None for a fresh run in an empty folder.

        Raises:
            ValueError: a run in the folder that is not to be resumed, or that was made otherwise (with the difference).
            FloatingPointError: a round stayed NaN or infinite; what was finite last is saved.
            OSError: a checkpoint could not be written; earlier ones are whole.
        """
        self._stopping = False
        self.run.open(self, resume)
        if self.step + self.config.preview_every <= self.config.steps:
            self.monitor.draw_teacher()
        self.whole = None
        self.proof = Proof(self.student.network, self.teacher.denoiser)
        with self._signals(), progress(disable=not self.ranks.leads) as bar, self.monitor, self.proof:
            task = bar.add_task("distilling", total=self.config.steps, completed=self.step)
            try:
                while self.step < self.config.steps and not self._stop_agreed():
                    with self.proof.step("round"):
                        figures = self._round()
                    self.step += 1
                    self.monitor.record(figures)
                    bar.update(task, completed=self.step, description=self.monitor.summary())
                    if self._due(self.config.checkpoint_every):
                        self.run.save(self)
                    if self._due(self.config.preview_every):
                        self.monitor.preview()
            except FloatingPointError:
                self.run.save(self)
                raise
            self.run.save(self)

    @property
    def interrupted(self) -> bool:
        """Whether the last `fit` ended before its time."""
        return self.step < self.config.steps

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The student with its averaged weights inside the block, and as it was after it."""
        self.average.swap(self.student.trained())
        try:
            yield
        finally:
            self.average.swap(self.student.trained())

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _round(self) -> dict[str, float]:
        """One update of the heads, one of the student."""
        # Dropout of the student, if it has any, is the only thing that asks torch's own generator.
        torch.manual_seed(noises.mix((self.config.seed << 32) + self.step, noises.TRAINING + 1000 + self.ranks.index))
        figures: dict[str, float] = {}
        kept: Kept | None = None
        if self.config.adversarial:
            kept = Kept()
            figures |= self._attempt("discriminator", lambda attempt: self._discriminator_phase(attempt, kept))
        figures |= self._attempt("generator", lambda attempt: self._generator_phase(attempt, kept))
        for schedule in self.schedules if self.config.adversarial else self.schedules[:1]:
            schedule.step()
        return figures

    def _attempt(self, name: str, phase: Callable[[int], dict[str, float]]) -> dict[str, float]:
        """A phase, repeated with other noise as long as it is not finite."""
        broken: list[str] = []
        for attempt in range(self.config.retries + 1):
            figures = phase(attempt)
            broken = [key for key, value in figures.items() if not math.isfinite(value)]
            if not broken:
                return figures
        raise FloatingPointError(
            f"Round {self.step + 1}: {', '.join(broken)} of the {name} stayed NaN or infinite in {self.config.retries + 1} "
            "attempts. The weights from before are saved. Lower --lr and --disc-lr, or check the data for extreme values."
        )

    def _discriminator_phase(self, attempt: int, kept: Kept) -> dict[str, float]:
        """Gradients and update of the heads. In a fused round the fakes are made with their graph, and kept."""
        self._zero()
        figures: list[Figures] = []
        for draw in self._draws(attempt):
            found: Figures = {}
            with self.autocast():
                references = self.rounds.references(draw)
                with torch.set_grad_enabled(self.config.is_fused):
                    fakes = self.rounds.fakes(draw)
                for loss, part in self.rounds.discriminator_losses(draw, references, fakes, r1=self._r1()):
                    self.accelerator.backward(loss / self.config.accumulation)
                    found |= {key: found.get(key, 0) + value for key, value in part.items()}
            figures.append(found)
            if self.config.is_fused:
                kept.draw, kept.fakes = draw, fakes
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        return self._finish("d", self.discriminator, self.heads_optimizer, self.student, figures)

    def _generator_phase(self, attempt: int, kept: Kept | None) -> dict[str, float]:
        """Gradients and update of the student, against heads that are frozen."""
        self._zero()
        figures: list[Figures] = []
        with _frozen(self.discriminator):
            for micro, draw in enumerate(self._draws(attempt)):
                with self._exchange(micro), self.autocast():
                    if kept is not None and kept.fakes is not None and kept.draw is not None:
                        draw, fakes = kept.draw, kept.fakes
                        kept.fakes = None  # its graph serves once
                    else:
                        fakes = self.rounds.fakes(draw)
                    loss, found = self.rounds.generator_loss(draw, fakes)
                    self.accelerator.backward(loss / self.config.accumulation)
                figures.append(found)
        means = self._finish("g", self.student, self.student_optimizer, self.discriminator, figures)
        if all(math.isfinite(value) for value in means.values()):
            self.average.update(self.student.trained())
        return means

    def _r1(self) -> float:
        """gamma in this round: lazily, `r1_every` times as large in every so manieth."""
        return 0.0 if (self.step + 1) % self.config.r1_every else self.config.r1_every * self.config.r1

    def _draws(self, attempt: int) -> Iterator[Draw]:
        """The micro-batches of the round."""
        return (self.draws(self.step, micro, attempt) for micro in range(self.config.accumulation))

    def _exchange(self, micro: int) -> Any:
        """Where the student's gradients are computed: processes exchange them in the last micro-batch."""
        return nullcontext() if micro == self.config.accumulation - 1 else self.accelerator.no_sync(self.wrapped_student)

    def autocast(self) -> torch.autocast:
        """The precision that the networks compute in."""
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16")

    def _zero(self) -> None:
        for optimizer in (self.student_optimizer, self.heads_optimizer):
            optimizer.zero_grad(set_to_none=True)

    def _finish(self, name: str, network: nn.Module, optimizer: Any, other: nn.Module, figures: list[Figures]) -> dict[str, float]:
        """Check that gradients are where they belong and finite, then update; means of figures over micro-batches and processes."""
        for foreign in (other, self.teacher.denoiser.network):
            strays = [key for key, p in foreign.named_parameters() if p.grad is not None]
            if strays:
                raise RuntimeError(f"The phase {name!r} left a gradient in {strays[0]} of {type(foreign).__name__}.")
        norm = self.accelerator.clip_grad_norm_(network.parameters(), self.config.grad_clip or math.inf)
        keys = list(figures[0])
        values = torch.stack([torch.stack([found[key].float() for found in figures]).mean() for key in keys])
        # A value that is not finite on one process is not finite in the mean, so all decide alike.
        values = self.accelerator.reduce(torch.cat([values, torch.as_tensor(norm).to(values).reshape(1)]), "mean")
        means = dict(zip([*keys, f"{name}_gradient"], values.tolist(), strict=True))
        if all(math.isfinite(value) for value in means.values()):
            optimizer.step()
        return means

    def _stop_agreed(self) -> bool:
        """Whether any process was told to stop: all stop after the same round."""
        if self.ranks.world == 1:
            return self._stopping
        flag = torch.tensor(float(self._stopping), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the round; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _refuse_plugins() -> None:
    """Refuse what splits networks over processes: DeepSpeed takes one model, and checkpoints here are those of whole ones."""
    for name, what in (("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"{what} is set for accelerate, but here each process keeps student, teacher and heads whole. Launch without it; a "
                "LoRA student (--student lora:RANK) needs the least memory."
            )


@dataclasses.dataclass
class Kept:
    """What the discriminator's phase of a fused round leaves for the generator's."""

    draw: Draw | None = None
    fakes: Fakes | None = None


@contextmanager
def _frozen(discriminator: nn.Module) -> Iterator[None]:
    """Heads without gradients, in eval mode, where spectral norm does not move."""
    discriminator.requires_grad_(False).eval()
    try:
        yield
    finally:
        discriminator.requires_grad_(True).train()
