"""Trains `furniture`: a class-conditional diffusion model of clouds of generated furniture, the templates of part assembly.

Clouds are area-uniform samples of all surfaces, centred, of unit standard deviation. Each time one is seen it is other points of
it, turned by up to 10 degrees about the vertical and scaled by up to 5 %. The loss is that of
`genkit.zoo.training.text_to_latent.velocity_loss`, on the cosine schedule; a tenth of the clouds have no class.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from genkit.assembly.point_transformer import PointSetTransformer
from genkit.assembly.symmetry import axis_rotation
from genkit.console import progress
from genkit.data.furniture import CATEGORIES, draw
from genkit.pipelines.assembly import PartAssemblyPipeline
from genkit.training import TrainConfig, fit
from genkit.zoo.training.text_to_latent import velocity_loss

CONFIG = TrainConfig(steps=9000, batch_size=32, lr=5e-4, warmup=200, seed=91, ema_decay=0.999, validate_every=500, bf16=False)
SHAPES, HELD = 2000, 64  # of each category, to train on and to validate on
STORED, POINTS = 2048, 512  # points of each that are kept, and that are seen at a time
TURN, JITTER, NO_CLASS = math.radians(10), 0.05, 0.1


def point_scheduler() -> DDIMScheduler:
    """The noise schedule of clouds: cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), v-prediction, nothing clipped."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )


def normalised(clouds: Tensor) -> Tensor:
    """Clouds (..., N, 3), centred, of unit standard deviation over points and axes together."""
    centred = clouds - clouds.mean(-2, keepdim=True)
    return centred / centred.square().mean((-1, -2), keepdim=True).sqrt()


def furniture_clouds(split: str, count: int, cache: Path | None = None) -> Tensor:
    """Clouds (categories, count, STORED, 3), float16; kept in a file, since drawing them takes minutes."""
    file = None if cache is None else cache / f"clouds-{split}-{count}.pt"
    if file is not None and file.is_file():
        return torch.load(file, weights_only=True)
    with progress() as bar:
        task = bar.add_task(f"furniture of {split}", total=len(CATEGORIES) * count)
        rows = []
        for category in CATEGORIES:
            for seed in range(count):
                rows.append(normalised(draw(category, seed, split).cloud(STORED, seed)).half())
                bar.advance(task)
    clouds = torch.stack(rows).unflatten(0, (len(CATEGORIES), count))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(clouds, file)
    return clouds


def augmented(clouds: Tensor, generator: torch.Generator, points: int = POINTS) -> Tensor:
    """Other points of clouds (B, N, 3), each cloud turned and scaled a little."""
    rows = torch.rand(clouds.shape[:2], generator=generator).argsort(1)[:, :points, None].expand(-1, -1, 3)
    angles = (2 * torch.rand(len(clouds), generator=generator) - 1) * TURN
    scale = 1 + (2 * torch.rand(len(clouds), 1, 1, generator=generator) - 1) * JITTER
    return scale * (clouds.float().gather(1, rows) @ axis_rotation(1, angles).mT)


def cloud_loss(model: Any, clouds: Tensor, labels: Tensor, generator: torch.Generator, device: str) -> Tensor:
    """The loss of clean clouds (B, N, 3) with labels (B,), on the CPU."""
    return velocity_loss(
        lambda x, t, labels: model(x, t, class_labels=labels).sample, clouds, labels, generator, device,
        alphas_cumprod=point_scheduler().alphas_cumprod,
    )  # fmt: skip


def train(
    folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu", shapes: int = SHAPES,
    config: TrainConfig = CONFIG, **network: int,
) -> None:  # fmt: skip
    """Train the embedded `furniture`.

    Args:
        shapes: of each category to train on.
        **network: of `PointSetTransformer`.
    """
    config = config if steps is None else dataclasses.replace(config, steps=steps)
    clouds, held = furniture_clouds("train", shapes, folder / "training"), furniture_clouds("val", HELD, folder / "training")
    torch.manual_seed(config.seed)
    model = PointSetTransformer(list(CATEGORIES), sample_size=POINTS, **network)

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        labels = torch.randint(len(CATEGORIES), (config.batch_size,), generator=generator)
        rows = torch.randint(shapes, (config.batch_size,), generator=generator)
        seen = augmented(clouds[labels, rows], generator)
        dropped = torch.rand(config.batch_size, generator=generator) < NO_CLASS
        return cloud_loss(model, seen, torch.where(dropped, len(CATEGORIES), labels), generator, device)

    def validate(model: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed)
        labels = torch.arange(len(CATEGORIES)).repeat_interleave(HELD)
        losses = [
            cloud_loss(model, held.flatten(0, 1)[rows, :POINTS].float(), labels[rows], generator, device)
            for rows in torch.randperm(len(labels), generator=generator).split(64)
        ]
        return {"loss": torch.stack(losses).mean().item()}

    best = fit(model, loss, config, folder / "training", name="furniture", resume=resume, device=device, validate=validate)
    PartAssemblyPipeline(best.to("cpu"), point_scheduler()).save_pretrained(folder)
