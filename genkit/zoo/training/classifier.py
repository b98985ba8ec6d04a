"""Trains `digits-classifier` (which guides) and `digits-judge` (which only measures): different networks, seeds and widths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.classifiers import AttributeClassifier
from genkit.data import digits
from genkit.training import TrainConfig, fit

SETTINGS: dict[str, dict[str, Any]] = {
    "digits-classifier": {"block_out_channels": (16, 32, 64, 128), "activation": "relu"},
    "digits-judge": {"block_out_channels": (24, 48, 96, 128), "activation": "silu", "dropout": 0.2},
}
CONFIGS = {
    "digits-classifier": TrainConfig(steps=2500, lr=2e-3, seed=11),
    "digits-judge": TrainConfig(steps=2200, lr=2e-3, seed=12),
}


def train(name: str, folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu") -> None:
    """Train one of the two and save it to `folder` (fp16 safetensors)."""
    config = CONFIGS[name] if steps is None else dataclasses.replace(CONFIGS[name], steps=steps)
    torch.manual_seed(config.seed)
    labels = {key: list(names) for key, names in digits.LABELS.items()}
    model = AttributeClassifier(labels=labels, layers_per_block=1, **SETTINGS[name])

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        batch = digits.draw("train", config.batch_size, seed=seed, augment="strong")
        images = batch.images.to(device)
        logits = model.attributes(images)
        # The name of an attribute is also the name of its labels in the batch.
        losses = [
            F.cross_entropy(logits[key].float(), getattr(batch, key).to(device), label_smoothing=0.05) for key in digits.LABELS
        ]
        return torch.stack(losses).sum()

    ema = fit(model, loss, config, folder / "training", name=name, resume=resume, device=device)
    ema.to("cpu", torch.float16).save_pretrained(folder)
