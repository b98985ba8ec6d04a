"""Trains a prior of layouts: a diffusion model of classes and boxes that never sees a picture; see `genkit.layouts.prior`.

The loss is that of `genkit.zoo.training.text_to_latent.velocity_loss`, on the cosine schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.data import scenes
from genkit.layouts.layout import Layout, pack, shuffled
from genkit.layouts.prior import LayoutPrior, prior_scheduler, to_samples
from genkit.pipelines.layout import LayoutPriorPipeline
from genkit.training import TrainConfig, fit
from genkit.zoo.training.text_to_latent import velocity_loss

CONFIG = TrainConfig(steps=6000, batch_size=256, lr=2e-3, warmup=200, seed=73, ema_decay=0.999, validate_every=500, bf16=False)
SLOTS = 6
SCENES = 40_000  # layouts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutPriorConfig:
    """How to train a prior.

    Args:
        slots: most objects of a layout. Beside a layout-to-image model, as many as it has.
        width, layers: of the transformer.
        train: everything else.
    """

    slots: int = SLOTS
    width: int = 96
    layers: int = 3
    train: TrainConfig = CONFIG


def train_layout_prior(
    layouts: Sequence[Layout],
    class_names: Sequence[str],
    folder: Path,
    config: LayoutPriorConfig | None = None,
    *,
    resume: bool = False,
    device: str = "cpu",
) -> dict[str, float]:
    """Train on layouts, a twentieth of which decides which weights are kept, and save a `LayoutPriorPipeline` to `folder`.

    Returns:
        "layouts", and "nats", the mean of -log p(y) of the held-out ones up to a constant.

    Raises:
        ValueError: fewer than 20 layouts, a class that is not among the names, or more objects than slots.
    """
    config = config or LayoutPriorConfig()
    if len(layouts) < 20:
        raise ValueError(f"There are {len(layouts)} layouts. A prior needs at least 20, better thousands.")
    packed = pack(layouts, class_names, config.slots)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(config.train.seed))
    held_out, rest = packed[order[: len(packed) // 20]], packed[order[len(packed) // 20 :]]
    torch.manual_seed(config.train.seed)
    model = LayoutPrior(list(class_names), slots=config.slots, width=config.width, layers=config.layers)
    val = to_samples(held_out, len(class_names))

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(rest), (config.train.batch_size,), generator=generator)
        y = to_samples(shuffled(rest[rows], generator), len(class_names))
        return _loss(model, y, generator, device)

    def validate(model: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.train.seed)
        return {"loss": _loss(model, val, generator, device).item()}

    best = fit(model, loss, config.train, folder / "training", name="layout prior", resume=resume, device=device, validate=validate)
    pipe = LayoutPriorPipeline(best.to("cpu"), prior_scheduler())
    pipe.save_pretrained(folder)
    return {"layouts": len(layouts), "nats": float(pipe.nats(held_out[:500]).mean())}


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu") -> None:
    """Train the embedded `scenes-prior`: on the layouts of training scenes, of which every fifth is crowded."""
    config = LayoutPriorConfig()
    if steps is not None:
        config = dataclasses.replace(config, train=dataclasses.replace(CONFIG, steps=steps))
    layouts = scenes.layouts("train", SCENES, seed=2000)
    train_layout_prior(layouts, scenes.CLASSES, folder, config, resume=resume, device=device)


def _loss(model: Any, y: Tensor, generator: torch.Generator, device: str) -> Tensor:
    """The loss of clean samples y (B, N, K + 5), on the CPU; a prior is conditioned on nothing."""
    return velocity_loss(
        lambda x, t, nothing: model(x, t), y, y[:, :0], generator, device, alphas_cumprod=prior_scheduler().alphas_cumprod
    )
