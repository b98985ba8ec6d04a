"""The one training loop of the small networks: AdamW, warm-up and cosine decay, EMA, validation, checkpoints, resume, processes.

Step k of process r sees random numbers that depend on (seed, k, r) alone, so an interrupted run that is resumed ends where an
uninterrupted one does.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genkit.attention.proof import Proof
from genkit.checkpoints import load_pt
from genkit.console import progress
from genkit.errors import unknown
from genkit.files import shorten_log
from genkit.ranks import Ranks

OPTIMIZERS = ("adamw", "lamb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        steps, batch_size: length of the run; the batch is that of each process.
        lr: peak learning rate, after `warmup` steps; cosine decay to zero.
        betas: of the optimizer.
        optimizer: "adamw", or "lamb" for batches of thousands (You et al. 2019, arXiv 1904.00962; of timm).
        ema_decay: decay of the exponential moving average of the weights, which is what is saved; 0 keeps the last weights.
        validate_every: steps between two validations, where the run has one.
        patience: stop after this many validations without a new best; 0 never stops early.
        checkpoint_seconds: time between two checkpoints.
        bf16: autocast to bfloat16.
        trackers: of accelerate, which get what log.jsonl gets: "tensorboard", "wandb", ...

    Raises:
        ValueError: a length, batch, patience or interval that is no positive number, a decay outside 0 to 1, or another optimizer.
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    seed: int = 0
    validate_every: int = 100
    patience: int = 0
    checkpoint_seconds: float = 120.0
    bf16: bool = True
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: str = "adamw"
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive, got {self.steps} and {self.batch_size}.")
        if self.validate_every < 1 or self.patience < 0:
            raise ValueError(f"validate_every={self.validate_every} must be positive, and patience={self.patience} not negative.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is not in 0 to 1.")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)


def fit(
    model: nn.Module,
    loss: Callable[[Any, torch.Generator, int], Tensor],
    config: TrainConfig,
    folder: Path,
    *,
    name: str,
    resume: bool = False,
    device: str = "cpu",
    validate: Callable[[Any], dict[str, float]] | None = None,
    ranks: Ranks | None = None,
) -> Any:
    """Train `model` and return its EMA, a model of the same class: the best by validation where there is one, else the last.

    Args:
        loss: `(model, generator, step) -> scalar`; all randomness of the step comes from the generator.
        folder: where `checkpoint.pt` and `log.jsonl` go.
        resume: continue from `checkpoint.pt` if it is there.
        validate: `(EMA in eval mode) -> figures`; the one called "loss" decides which weights are the best.
        ranks: the processes that train together, after `Ranks.join`: gradients are averaged over them.

    Raises:
        FloatingPointError: the loss became NaN or infinite; names the step.
    """
    run = _Run(model, config, folder, name, device, ranks or Ranks())
    if resume:
        run.restore()
    return run.train(loss, validate)


class _Run:
    """The state of one training run."""

    def __init__(self, model: nn.Module, config: TrainConfig, folder: Path, name: str, device: str, ranks: Ranks) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.folder, self.name, self.device, self.ranks = config, folder, name, device, ranks
        self.model = model.to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(trained, config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: _warmup_cosine(k, config))
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
        self.proof = Proof(model)
        self.step = 0
        self.average: float | None = None
        self.best: dict[str, Any] = {"loss": math.inf, "step": 0, "weights": None}

    def restore(self) -> None:
        """Continue from the checkpoint, if there is one."""
        file = self.folder / "checkpoint.pt"
        if not file.exists():
            return
        try:
            state = load_pt(file, self.device)
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step, self.best = int(state["step"]), dict(state["best"])
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"The checkpoint {str(file)!r} is damaged, or of another run ({type(error).__name__}). Remove it to start again."
            ) from error

    def save(self) -> None:
        """Write the checkpoint; it is there whole or not at all. The processes are alike, so the first one does it."""
        if not self.ranks.leads:
            return
        state: dict[str, Any] = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict()}
        state |= {"schedule": self.schedule.state_dict(), "step": self.step, "best": self.best}
        file = self.folder / "checkpoint.pt"
        temporary = file.with_suffix(".tmp")
        try:
            with open(temporary, "wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except (OSError, RuntimeError) as error:  # what torch.save raises when the disk is full
            raise OSError(f"The checkpoint {str(file)!r} could not be written ({error}). Is the disk full?") from error
        finally:
            temporary.unlink(missing_ok=True)

    def train(self, loss: Callable[..., Tensor], validate: Callable[[Any], dict[str, float]] | None) -> Any:
        config, saved = self.config, time.monotonic()
        self.began, told = saved, self.step > 0
        file = self.folder / f"log{self.ranks.index or ''}.jsonl"
        shorten_log(file, self.step)
        try:
            with (
                self.proof,
                progress(disable=not self.ranks.leads) as bar,
                open(file, "a", encoding="utf-8") as log,
                self._trackers() as track,
            ):
                task = bar.add_task(self.name, total=config.steps, completed=self.step)
                while self.step < config.steps and not (validate and self._exhausted()):
                    with self.proof.step("update"):
                        self._advance(loss)
                    bar.update(task, completed=self.step, description=f"{self.name}  loss {self.average:.4f}")
                    entry: dict[str, Any] = {}
                    if validate and (self.step % config.validate_every == 0 or self.step == config.steps):
                        entry["validation"] = self._validate(validate)
                    if entry or self.step % 50 == 0:
                        entry = {"step": self.step, "loss": round(self.average or 0.0, 5), **entry}
                        track({"loss": entry["loss"], **entry.get("validation", {})}, self.step)
                        entry |= {} if told else {"attention": self.proof.to_dict()}
                        told = True
                        print(json.dumps(entry | {"seconds": round(time.monotonic() - self.began, 1)}), file=log, flush=True)
                    if time.monotonic() - saved > config.checkpoint_seconds:
                        self.save()
                        saved = time.monotonic()
        finally:
            self.save()
        if self.best["weights"] is not None:
            self.ema.module.load_state_dict(self.best["weights"])
        return self.ema.module.eval()

    def _advance(self, loss: Callable[..., Tensor]) -> None:
        """One update of the weights."""
        config = self.config
        seed = config.seed * 1_000_003 + self.step + 1_000_000_007 * self.ranks.index
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed ^ 0x5DEECE66D)  # of dropout, which asks torch's own generator
        before = [buffer.clone() for buffer in self.model.buffers()]
        try:
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=config.bf16):
                value = loss(self.model, generator, self.step)
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"The loss of {self.name} became {value.item()} at step {self.step}. Lower the learning rate."
                )
        except BaseException:
            # The checkpoint is that of the step before: statistics of BatchNorm that this one has moved go back.
            for buffer, value in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(value)
            raise
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.schedule.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        self.average = value.item() if self.average is None else 0.98 * self.average + 0.02 * value.item()

    def _average_gradients(self) -> None:
        """Over the processes; not by DDP, since losses call more of a model than its `forward`."""
        if self.ranks.world > 1:
            from accelerate.utils import reduce

            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = reduce(parameter.grad, "mean")

    @contextmanager
    def _trackers(self) -> Iterator[Callable[[dict[str, float], int], None]]:
        """What sends figures to the trackers."""
        if not self.config.trackers:
            yield lambda figures, step: None
            return
        from accelerate import Accelerator

        cpu = torch.device(self.device).type == "cpu"
        accelerator = Accelerator(log_with=list(self.config.trackers), project_dir=str(self.folder), cpu=cpu)
        accelerator.init_trackers("tracker")
        try:
            yield lambda figures, step: accelerator.log(figures, step=step)
        finally:
            # Not `end_training`, which would also part the processes.
            for tracker in accelerator.trackers:
                tracker.finish()

    def _validate(self, validate: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        model = self.ema.module.eval()
        with torch.no_grad():
            figures = validate(model)
        if figures["loss"] < self.best["loss"]:
            self.best = {"loss": figures["loss"], "step": self.step, "weights": copy.deepcopy(model.state_dict())}
        return {key: round(value, 5) for key, value in figures.items()}

    def _exhausted(self) -> bool:
        """Whether the last `patience` validations brought nothing new."""
        waited = self.step - self.best["step"]
        return self.config.patience > 0 and self.best["step"] > 0 and waited >= self.config.patience * self.config.validate_every


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    make: Any = torch.optim.AdamW
    if config.optimizer == "lamb":
        from timm.optim import Lamb as make
    return make(parameters, lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)


def _warmup_cosine(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    fraction = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
