"""The one training loop behind `genkit zoo train`: AdamW, warm-up and cosine decay, EMA, checkpoints, resume.

Step k sees random numbers that depend on (seed, k) alone, so an interrupted run that is resumed ends where an
uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from genkit.console import progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Args:
        steps, batch_size: length of the run.
        lr: peak learning rate of AdamW (betas 0.9, 0.99), after `warmup` steps; cosine decay to zero.
        ema_decay: decay of the exponential moving average of the weights, which is what is saved.
        checkpoint_seconds: time between two checkpoints.
        bf16: autocast to bfloat16.
    """

    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_seconds: float = 120.0
    bf16: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive, got {self.steps} and {self.batch_size}.")


def fit(
    model: nn.Module,
    loss: Callable[[Any, torch.Generator, int], Tensor],
    config: TrainConfig,
    folder: Path,
    *,
    name: str,
    resume: bool = False,
    device: str = "cpu",
) -> Any:
    """Train `model` and return its EMA, a model of the same class.

    Args:
        loss: `(model, generator, step) -> scalar`; all randomness of the step comes from the generator.
        folder: where `checkpoint.pt` and `log.jsonl` go.
        resume: continue from `checkpoint.pt` if it is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _warmup_cosine(k, config))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    start = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state | {"schedule": schedule.state_dict(), "step": step}, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    saved = began = time.monotonic()
    average = None
    done = start
    try:
        with progress() as bar, open(folder / "log.jsonl", "a") as log:
            task = bar.add_task(name, total=config.steps, completed=start)
            for step in range(start, config.steps):
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
                with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
                    value = loss(model, generator, step)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                optimizer.step()
                schedule.step()
                ema.update_parameters(model)
                done = step + 1
                if not torch.isfinite(value):
                    raise FloatingPointError(f"The loss of {name} became {value.item()} at step {step}. Lower the learning rate.")
                average = value.item() if average is None else 0.98 * average + 0.02 * value.item()
                bar.update(task, completed=done, description=f"{name}  loss {average:.4f}")
                if done % 50 == 0:
                    entry = {"step": done, "loss": round(average, 5), "seconds": round(time.monotonic() - began, 1)}
                    print(json.dumps(entry), file=log, flush=True)
                if time.monotonic() - saved > config.checkpoint_seconds:
                    save(done)
                    saved = time.monotonic()
    finally:
        save(done)
    return ema.module.eval()


def _warmup_cosine(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    fraction = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
