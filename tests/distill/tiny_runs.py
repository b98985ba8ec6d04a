"""Distillations of tiny random pipelines: data that no teacher had to draw, and trainers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit import noise
from genkit.denoisers import Denoiser
from genkit.denoisers.text import TextDenoiser
from genkit.distill import LatentDataset
from genkit.distill.config import DistillConfig
from genkit.distill.data import latent_space
from genkit.distill.shards import SYNTH, Part, fill
from genkit.distill.trainer import DistillTrainer
from genkit.ranks import Ranks
from tests import tiny

PROMPTS = ("a red seven", "a blue cat", "a green three on yellow paper", "a seven")


def denoiser_of(family: str, **config: Any) -> Denoiser:
    return Denoiser.of(tiny.pipeline(family, **config))


def size_of(family: str) -> int | None:
    return 16 if family == "flux" else None  # Flux has no size of its own


def data_of(
    denoiser: Denoiser,
    folder: Path,
    count: int = 16,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    paired: bool = True,
    broken: bool = False,
) -> LatentDataset:
    """Random latents, `count` of each shape, with prompts or labels where the family takes them.

    Args:
        broken: every value is NaN.
    """
    size = size_of(denoiser.family)
    shapes = shapes or [denoiser.latent_shape(size, size)]
    parts = [Part(range(i * count, (i + 1) * count), shape) for i, shape in enumerate(shapes)]

    def make(part: Part) -> tuple[dict[str, Tensor], dict[str, Any]]:
        rows = list(part.rows)
        metadata: dict[str, Any] = {"paired": paired}
        if isinstance(denoiser, TextDenoiser):
            metadata["prompts"] = [PROMPTS[row % len(PROMPTS)] for row in rows]
        elif getattr(denoiser, "num_classes", None) is not None:
            metadata["labels"] = [row % 5 for row in rows]
        return {"latents": noise.normal(rows, part.shape, noise.SAMPLER), "seed": torch.tensor(rows)}, metadata

    settings = {"space": latent_space(denoiser), "storage": "float32", "sampler": "ddim"}
    fill(folder, SYNTH, settings, parts, make, resume=True, ranks=Ranks(), progress=lambda items: None)
    data = LatentDataset(folder)
    if broken:
        data.latents = lambda rows, own=data.latents: own(rows) * torch.nan  # type: ignore[method-assign, misc]
    return data


def settings(**changes: Any) -> DistillConfig:
    """Quick ones, with learning rates at which a few rounds move the weights."""
    quick = {
        "batch_size": 4, "steps": 2, "head_width": 8, "lr": 1e-3, "disc_lr": 1e-3, "checkpoint_every": 0, "preview_every": 0,
        "log_every": 1, "r1_every": 1,
    }  # fmt: skip
    return DistillConfig(**{**quick, **changes})


def trainer_of(folder: Path, family: str = "sd3", *, count: int = 16, **changes: Any) -> DistillTrainer:
    """A trainer of a tiny teacher, on data in `folder`/data, into `folder`/run; `changes` of the settings."""
    denoiser = denoiser_of(family)
    return DistillTrainer(denoiser, data_of(denoiser, folder / "data", count), settings(**changes), folder / "run")
