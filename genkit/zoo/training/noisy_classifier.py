"""Trains `digits-noisy-classifier`: digit, ink and paper of noisy latents of `digits`, at every noise level.

Noise-to-signal ratios are log-uniform over those of the schedule. It guides by itself, and its trunk is the frozen feature
extractor of `digits-discriminator`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit import zoo
from genkit.data import digits
from genkit.denoisers import Denoiser
from genkit.guidance.networks import random_levels
from genkit.guidance.noisy_classifier import NoisyClassifier
from genkit.training import TrainConfig, fit

CONFIG = TrainConfig(steps=3000, batch_size=128, lr=1.5e-3, seed=41)
ENCODER = {
    "block_out_channels": (48, 64),
    "layers_per_block": 1,
    "attention": (False, False),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
POOL = 40_000  # augmented pictures that are encoded once, before training


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu", pool: int = POOL) -> None:
    """Train it and save it to `folder` (fp16 safetensors)."""
    from diffusers import DiffusionPipeline

    from genkit.guidance.origin import origin

    config = CONFIG if steps is None else dataclasses.replace(CONFIG, steps=steps)
    pipe = DiffusionPipeline.from_pretrained(zoo.path("digits"), dtype=torch.float32).to(device)
    denoiser = Denoiser.of(pipe)
    torch.manual_seed(config.seed)
    batch = digits.draw("train", pool, seed=config.seed, augment="mild")
    with torch.no_grad():
        latents = torch.cat([denoiser.encode(part.to(device)).cpu() for part in batch.images.split(256)])
    model = NoisyClassifier(
        {key: list(names) for key, names in digits.LABELS.items()}, denoiser.latent_shape(None, None), ENCODER, origin(pipe)
    )

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(pool, (config.batch_size,), generator=generator)
        x0 = latents[rows]
        level = random_levels(len(x0), generator)
        x = level.diffuse(x0, torch.randn(x0.shape, generator=generator)).to(device)
        logits = model.attributes(x, level)
        losses = [F.cross_entropy(logits[key].float(), getattr(batch, key)[rows].to(device)) for key in digits.LABELS]
        return torch.stack(losses).sum()

    ema = fit(model, loss, config, folder / "training", name="digits-noisy-classifier", resume=resume, device=device)
    ema.to("cpu", torch.float16).save_pretrained(folder)
