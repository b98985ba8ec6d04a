"""Trains `furniture`: a diffusion model of clouds of generated furniture, given the category and a list of the parts, or neither.

Clouds are area-uniform samples of all surfaces, centred, all of one area, so that a list of parts tells their size. Each time one
is seen it is other points of it, turned by up to 10 degrees about the vertical and scaled by up to 2 %, with 128 or 256 points: a
network that always saw as many draws the middle of its category from more, and steps of few points are cheap. The loss is that of
`genkit.zoo.training.text_to_latent.velocity_loss`, on the cosine schedule. A tenth of the clouds have no class, a fifth no parts;
descriptors of parts are off by about a hundredth.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from genkit.assembly.descriptors import FEATURES, part_features
from genkit.assembly.parts import POINTS
from genkit.assembly.point_transformer import PointSetTransformer
from genkit.assembly.surfaces import sample_mesh
from genkit.assembly.symmetry import axis_rotation
from genkit.console import progress
from genkit.data.furniture import CATEGORIES, MOST_PARTS, draw
from genkit.pipelines.assembly import PartAssemblyPipeline
from genkit.training import TrainConfig, fit
from genkit.zoo.training.text_to_latent import velocity_loss

CONFIG = TrainConfig(steps=20000, batch_size=32, lr=1e-3, warmup=200, seed=91, ema_decay=0.999, validate_every=500, bf16=False)
SHAPES, HELD = 4000, 64  # of each category, to train on and to validate on
JOB = 50  # of a category, that a process draws at a time
STORED, SEEN = 2048, (128, 256)  # points of each that are kept, and that are seen at a time
CHECKED = 512  # in validation
SHARES = (0.4, 0.3, 0.1, 0.2)  # of the categories: chairs are made of the most kinds of parts, lamps of the fewest
SURFACE_AREA = 36.0  # of a cloud: chairs and tables have a standard deviation of about 1 then
TURN, JITTER = math.radians(10), 0.02
NO_CLASS, NO_PARTS, BLUR = 0.1, 0.2, 0.01


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Furniture by category (C) and number (n).

    Args:
        clouds: (C, n, STORED, 3), float16, normalised.
        parts: descriptors (C, n, MOST_PARTS, FEATURES), zero where there is no part.
        counts: of parts (C, n).
    """

    clouds: Tensor
    parts: Tensor
    counts: Tensor

    def __getitem__(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Clouds (B, STORED, 3), descriptors (B, MOST_PARTS, FEATURES) and which of them are parts (B, MOST_PARTS)."""
        clouds, parts, counts = (value[rows] for value in (self.clouds, self.parts, self.counts))
        return clouds, parts, torch.arange(parts.shape[1]) < counts[:, None]


def point_scheduler() -> DDIMScheduler:
    """The noise schedule of clouds: cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), v-prediction, nothing clipped."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )


def normalised(cloud: Tensor, area: float) -> Tensor:
    """A cloud (N, 3) of a surface of an area, centred, as large as a surface of `SURFACE_AREA` is."""
    return (cloud - cloud.mean(0)) * math.sqrt(SURFACE_AREA / area)


def furniture_shapes(split: str, count: int, cache: Path | None = None) -> Shapes:
    """Furniture of a split, `count` of each category; kept in a file, since drawing it takes minutes."""
    file = None if cache is None else cache / f"shapes-{split}-{count}.pt"
    if file is not None and file.is_file():
        return Shapes(**torch.load(file, weights_only=True))
    jobs = [(category, split, seeds) for category in CATEGORIES for seeds in torch.arange(count).split(JOB)]
    spawn = multiprocessing.get_context("spawn")
    # No process starts before it is given work, so none does (its imports take seconds) where there is little to draw.
    with progress() as bar, ProcessPoolExecutor(mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = map(_described, jobs) if count < JOB else pool.map(_described, jobs)
        rows = list(bar.track(drawn, total=len(jobs), description=f"furniture of {split}"))
    fields = (torch.cat(values).unflatten(0, (len(CATEGORIES), count)) for values in zip(*rows, strict=True))
    shapes = Shapes(*fields)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dataclasses.asdict(shapes), file)
    return shapes


def _described(job: tuple[str, str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `Shapes` of a category, a split and some seeds."""
    category, split, seeds = job
    clouds, parts = [], torch.zeros(len(seeds), MOST_PARTS, FEATURES)
    counts = torch.zeros(len(seeds), dtype=torch.long)
    for row, seed in enumerate(seeds.tolist()):
        drawn = draw(category, seed, split)
        points = torch.stack([sample_mesh(mesh, POINTS, seed)[0] for mesh in drawn.meshes])
        areas = torch.tensor([mesh.area for mesh in drawn.meshes])
        clouds.append(normalised(drawn.cloud(STORED, seed), float(areas.sum())).half())
        counts[row], parts[row, : len(points)] = len(points), part_features(points, areas)
    return torch.stack(clouds), parts, counts


def augmented(clouds: Tensor, generator: torch.Generator, points: int) -> Tensor:
    """Other points of clouds (B, N, 3) in no order, each cloud turned and scaled a little."""
    rows = (torch.randint(clouds.shape[1], (len(clouds), 1), generator=generator) + torch.arange(points)) % clouds.shape[1]
    angles = (2 * torch.rand(len(clouds), generator=generator) - 1) * TURN
    scale = 1 + (2 * torch.rand(len(clouds), 1, 1, generator=generator) - 1) * JITTER
    return scale * (clouds.gather(1, rows[..., None].expand(-1, -1, 3)).float() @ axis_rotation(1, angles).mT)


def cloud_loss(
    model: Any, clouds: Tensor, labels: Tensor, parts: Tensor, told: Tensor, generator: torch.Generator, device: str
) -> Tensor:  # fmt: skip
    """The loss of clean clouds (B, N, 3) with labels (B,), of parts (B, P, F) of which some are told (B, P), on the CPU."""
    parts, told = parts.to(device), told.to(device)
    return velocity_loss(
        lambda x, t, labels: model(x, t, class_labels=labels, parts=parts, part_mask=told).sample, clouds, labels, generator,
        device, alphas_cumprod=point_scheduler().alphas_cumprod,
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
    seen, held = furniture_shapes("train", shapes, folder / "training"), furniture_shapes("val", HELD, folder / "training")
    torch.manual_seed(config.seed)
    model = PointSetTransformer(
        list(CATEGORIES),
        sample_size=SEEN[-1],
        part_features=FEATURES,
        surface_area=SURFACE_AREA,
        **network,
    )

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        size = (config.batch_size,)
        labels = torch.multinomial(torch.tensor(SHARES), config.batch_size, replacement=True, generator=generator)
        rows = torch.randint(shapes, size, generator=generator)
        clouds, parts, told = seen[labels, rows]
        clouds = augmented(clouds, generator, SEEN[step % len(SEEN)])
        parts = parts * (1 + BLUR * torch.randn(parts.shape, generator=generator))
        told = told & (torch.rand(size, generator=generator) >= NO_PARTS)[:, None]
        labels = torch.where(torch.rand(size, generator=generator) < NO_CLASS, len(CATEGORIES), labels)
        return cloud_loss(model, clouds, labels, parts, told, generator, device)

    def validate(model: Any) -> dict[str, float]:
        """With parts and classes told, and, to know, without parts."""
        losses = {}
        for name, shown in (("loss", True), ("loss_without_parts", False)):
            generator = torch.Generator().manual_seed(config.seed)
            order = torch.randperm(len(CATEGORIES) * HELD, generator=generator)
            values = []
            for labels, rows in zip((order // HELD).split(64), (order % HELD).split(64), strict=True):
                clouds, parts, told = held[labels, rows]
                values.append(cloud_loss(model, clouds[:, :CHECKED].float(), labels, parts, told & shown, generator, device))
            losses[name] = torch.stack(values).mean().item()
        return losses

    best = fit(model, loss, config, folder / "training", name="furniture", resume=resume, device=device, validate=validate)
    PartAssemblyPipeline(best.to("cpu"), point_scheduler()).save_pretrained(folder)
