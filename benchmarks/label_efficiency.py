"""What a backbone is worth with few labels of digits: probe, fine-tuning, segmentation. And SimCLR, which it is compared with.

    L_i = -log exp(z_i . z_j / tau) / sum_{k != i} exp(z_i . z_k / tau)      z: normalised projections; i, j two views of a picture

(Chen et al. 2020, arXiv 2002.05709: NT-Xent, tau = 0.5, two layers of projection.) Used by `benchmarks/dreamteacher.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.data.source import ImageSource
from genkit.distill.dreamteacher_data import labelled_rows, labels_of
from genkit.distill.dreamteacher_losses import label_loss
from genkit.distill.dreamteacher_regressors import FeaturePyramid, resize
from genkit.distill.dreamteacher_student import Backbone
from genkit.features.linear import fit_linear_probe
from genkit.training import TrainConfig, fit

CLASSES = {"classification": 10, "segmentation": 11}
SMOOTHING = 0.1  # of labels in fine-tuning (Szegedy et al. 2016, arXiv 1512.00567)
CROP = 0.3  # SimCLR's views: how much of a side may be cut away


class Classifier(nn.Module):
    """A backbone, the means of its levels, a linear layer."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(sum(shape[0] for shape in backbone.levels), CLASSES["classification"])

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(torch.cat([level.mean((2, 3)) for level in self.backbone(pictures)], 1))


class Segmenter(nn.Module):
    """A backbone, a fresh feature pyramid, logits of each pixel."""

    def __init__(self, backbone: Backbone, width: int = 64) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = FeaturePyramid([shape[0] for shape in backbone.levels], width, pooling=False)
        self.head = nn.Conv2d(width, CLASSES["segmentation"], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        levels = self.pyramid(self.backbone(pictures))
        merged = torch.stack([resize(level, levels[0].shape[-2:]) for level in levels]).sum(0)
        return resize(self.head(merged), self.backbone.size)


def moved(pictures: Tensor, masks: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Pictures, and label maps, turned by up to 10 degrees, scaled by up to 10 % and moved by up to a sixteenth."""
    unit = 2 * torch.rand(4, len(pictures), generator=generator) - 1
    angle, scale, shift = unit[0] * 10 * torch.pi / 180, 1 + 0.1 * unit[1], unit[2:] / 8
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).reshape(-1, 2, 3).to(pictures.device)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    if masks is not None:
        masks = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    return pictures, masks


def view(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A view for SimCLR: moved, cropped, and in other colours (ink and paper are no content of a digit).

    Colours stay related: with views of which each has any colours, up to the negative, it learned nothing in 750 steps.
    """
    count = len(pictures)
    pictures, _ = moved(pictures, None, generator)
    scale = 1 - CROP * torch.rand(count, generator=generator)
    place = (2 * torch.rand(2, count, generator=generator) - 1) * (1 - scale)
    zero = torch.zeros(count)
    theta = torch.stack([scale, zero, place[0], zero, scale, place[1]], 1).reshape(-1, 2, 3).to(pictures.device)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    mix = torch.eye(3) + 0.5 * torch.randn(count, 3, 3, generator=generator)
    offset = 0.3 * torch.randn(count, 3, 1, 1, generator=generator)
    return torch.einsum("bij,bjhw->bihw", mix.to(pictures.device), pictures) + offset.to(pictures.device)


def nt_xent(z: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of projections (2 B, D), the views of picture i at i and B + i."""
    z = F.normalize(z.float(), dim=1)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, partner)


def simclr(backbone: Backbone, source: ImageSource, config: TrainConfig, folder: Path, device: str = "cpu") -> Backbone:
    """Pretrain a backbone by SimCLR; the rows of a step are those of DreamTeacher's."""
    from genkit.distill.data import batch_rows

    width = backbone.levels[-1][0]
    head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 128))
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    rows_of: Any = type("Rows", (), {"buckets": {(): range(len(source))}})()

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        pictures = source.images(batch_rows(rows_of, config.batch_size, config.seed, step), backbone.size).to(device)
        both = torch.cat([view(pictures, generator), view(pictures, generator)])
        return nt_xent(model["head"](model["backbone"](both)[-1].mean((2, 3))))

    return fit(model, loss, config, folder, name="simclr", resume=True, device=device)["backbone"]


@torch.no_grad()
def pooled(backbone: Backbone, source: ImageSource, batch_size: int = 100) -> Tensor:
    """The levels (N, D) of all rows, each pooled to 4 x 4 places, as `genkit.features` pools the teacher's for its probe."""
    backbone.eval()
    device = device_of(backbone)
    found = []
    for start in range(0, len(source), batch_size):
        levels = backbone(source.images(range(start, min(start + batch_size, len(source))), backbone.size).to(device))
        found.append(torch.cat([F.adaptive_avg_pool2d(level, min(4, level.shape[-1])).flatten(1) for level in levels], 1))
    return torch.cat(found)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def probe_accuracy(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Held-out accuracy of ridge regression, its penalty cross-validated on the labels that there are."""
    weight, bias, _ = fit_linear_probe(train, labels.to(train.device), CLASSES["classification"])
    return ((test @ weight.T + bias).argmax(1).cpu() == truth).float().mean().item()


def tuned(
    backbone: Backbone, task: str, source: ImageSource, rows: list[int], config: TrainConfig, folder: Path
) -> nn.Module:  # fmt: skip
    """A copy of a backbone and a fresh head, both trained on some labelled rows, where the backbone is."""
    device = device_of(backbone)
    torch.manual_seed(config.seed)
    dense = task == "segmentation"
    model = (Segmenter if dense else Classifier)(copy.deepcopy(backbone))
    labels, _ = labels_of(source, rows, backbone.size, dense=dense)
    labels = labels.to(device)

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(rows), (config.batch_size,), generator=generator)
        pictures = source.images([rows[i] for i in chosen.tolist()], backbone.size).to(device)
        chosen = chosen.to(device)
        pictures, masks = moved(pictures, labels[chosen] if dense else None, generator)
        logits = model(pictures).float()
        return label_loss(logits, masks) if dense else F.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)

    return fit(model, loss, config, folder, name=task, resume=True, device=str(device))


@torch.no_grad()
def measure(model: Any, task: str, source: ImageSource) -> dict[str, float]:
    """Accuracy of a classifier; mean intersection over union of a segmenter, over eleven classes and of ink alone."""
    model.eval()
    device = device_of(model)
    hits, confusion = 0, torch.zeros(CLASSES["segmentation"], CLASSES["segmentation"], dtype=torch.long)
    for start in range(0, len(source), 100):
        rows = list(range(start, min(start + 100, len(source))))
        found = model(source.images(rows, model.backbone.size).to(device)).float().cpu()
        if task == "classification":
            hits += int((found.argmax(1) == labels_of(source, rows, (1, 1), dense=False)[0]).sum())
        else:
            assert source.masks is not None
            truth = source.masks(rows, (32, 32)).flatten()
            predicted = resize(found, (32, 32)).argmax(1).flatten()
            confusion += torch.bincount(truth * len(confusion) + predicted, minlength=confusion.numel()).reshape(confusion.shape)
    if task == "classification":
        return {"accuracy": hits / len(source)}
    ink = torch.stack([confusion[0, :1].sum(), confusion[0, 1:].sum(), confusion[1:, 0].sum(), confusion[1:, 1:].sum()])
    both = confusion.diag().double()
    return {
        "miou": (both / (confusion.sum(0) + confusion.sum(1) - both).clamp_min(1)).mean().item(),
        "ink_iou": float(ink[3]) / float(ink[1:].sum()),
    }


def label_rows(source: ImageSource, count: int, seed: int, task: str) -> list[int]:
    """`count` labelled rows, all of them where they are as many; of every class alike."""
    if count >= len(source):
        return list(range(len(source)))
    return labelled_rows(source, count, seed, dense=task == "segmentation")
