"""Trains `digits-discriminator`: discriminator guidance for `digits`, sampled without classifier-free guidance in 10 and in 30
steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from genkit.data.source import open_source
from genkit.guidance.training import DiscriminatorConfig, train_discriminator
from genkit.runner import load

CONFIG = DiscriminatorConfig(count=16_000, steps=(10, 30), extractor="digits-noisy-classifier")


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu", count: int | None = None) -> None:
    """Train it and save it to `folder` (fp16 safetensors).

    Args:
        count: generated samples, by default as many as the embedded one has seen.
    """
    config = CONFIG if count is None else dataclasses.replace(CONFIG, count=count)
    if steps is not None:
        shorter = {name: dataclasses.replace(getattr(config, name), steps=steps) for name in ("matching", "train")}
        config = dataclasses.replace(config, **shorter)
    train_discriminator(load("digits", device=device), open_source("digits", config.count), folder, config, resume=resume)
