"""The baseline of detection: torchvision's FCOS, shrunk, trained to detect on the scenes that `scenes` was trained to draw.

    python benchmarks/detector.py FOLDER [--steps 4000] [--count 200]

Trains into FOLDER (or goes on there), and prints COCO's figures on held-out scenes; `benchmarks/detection.py` reads them from
FOLDER/figures.json. FCOS (Tian et al. 2019, arXiv 1904.01355) on a small convolutional network, 0.7 million parameters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from genkit.data import scenes
from genkit.data.coco import annotation_document, pixels
from genkit.files import write_atomic
from genkit.metrics.detection import average_precision
from genkit.training import TrainConfig, fit

POOL = 24_576  # scenes, the number that `scenes` saw
CONFIG = TrainConfig(steps=4000, batch_size=32, lr=2e-3, warmup=200, seed=81, ema_decay=0.998, bf16=False)


def detector() -> FCOS:
    """The network, for pictures of 64 x 64."""

    def stage(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for k in range(2):
            layers += [nn.Conv2d(outputs if k else inputs, outputs, 3, 1 if k else 2, 1), nn.GroupNorm(8, outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    body = nn.Sequential(stage(3, 32), stage(32, 64), stage(64, 128))
    backbone = BackboneWithFPN(body, {"1": "0", "2": "1"}, [64, 128], 64)  # and a level of half that size
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    sides: dict[str, Any] = {"min_size": scenes.SIZE, "max_size": scenes.SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return FCOS(backbone, len(scenes.CLASSES), anchor_generator=anchors, center_sampling_radius=1.5, **sides)


def train(folder: Path, steps: int) -> FCOS:
    """Train, or load what was trained."""
    file = folder / "detector.pt"
    torch.manual_seed(CONFIG.seed)
    model = detector()
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    drawn = [scenes.draw("train", 4096, seed=1000 + seed) for seed in range(POOL // 4096)]
    images = torch.cat([batch.images for batch in drawn])
    targets = [
        {"boxes": boxes * scenes.SIZE, "labels": labels}
        for batch in drawn
        for labels, boxes in zip(batch.labels, batch.boxes, strict=True)
    ]

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(images), (CONFIG.batch_size,), generator=generator).tolist()
        parts = model([images[row] / 2 + 0.5 for row in rows], [targets[row] for row in rows])
        return torch.stack(list(parts.values())).sum()

    config = TrainConfig(**{**vars(CONFIG), "steps": steps})
    best = fit(model, loss, config, folder / "training", name="detector", resume=True)
    torch.save(best.state_dict(), file)
    return best.eval()


@torch.no_grad()
def measure(model: FCOS, kind: str, count: int) -> dict[str, float]:
    """COCO's figures on held-out scenes."""
    batch = scenes.draw("test", count, kind=kind)
    results = []
    for i, image in enumerate(batch.images):
        (found,) = model([image / 2 + 0.5])
        for box, label, score in zip(found["boxes"], found["labels"].tolist(), found["scores"].tolist(), strict=True):
            bbox = pixels((box / scenes.SIZE).tolist(), scenes.SIZE, scenes.SIZE)
            results.append({"image_id": i, "category_id": label + 1, "bbox": bbox, "score": score})
    return average_precision(annotation_document(scenes.coco_images(batch), scenes.CLASSES), results)


def main() -> None:
    """Train, measure, print, write FOLDER/figures.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=CONFIG.steps)
    parser.add_argument("--count", type=int, default=200)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = train(arguments.folder, arguments.steps)
    figures: dict[str, Any] = {kind: measure(model, kind, arguments.count) for kind in ("mixed", "crowded")}
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    Console().print(figures)
    write_atomic(arguments.folder / "figures.json", (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
