"""DreamTeacher's feature interpreter: labels of pictures, or of their pixels, read from the frozen teacher's features.

    s_l = swish(GN(separable_conv [conv_1x1 f_l, up(s_{l-1})]))           from coarse to fine; width 256
    logits = up(conv_1x1 dropout(s_L)), or W mean(dropout(s_L)) + b           of pixels, or of pictures

(Li et al. 2023, arXiv 2307.07487, appendix; after BigDatasetGAN's.) It learns from few labels by cross-entropy and 3 Dice, and then
labels every picture softly for the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.distill.dreamteacher_losses import label_loss
from genkit.distill.dreamteacher_regressors import resize
from genkit.ranks import Ranks
from genkit.training import TrainConfig, fit

Size = tuple[int, int]


class Interpreter(nn.Module):
    """Logits of maps of several sizes.

    Args:
        shapes: (C, h, w) of each map, by name.
        num_classes: K.
        size: (height, width) of label maps.
        width: of the convolutions; 256 in the paper.
        dropout: before the classifier; 0.1 in the paper.
        dense: label pixels, not pictures.

    Example:
        >>> interpreter = Interpreter({"block.6": (128, 4, 4), "block.8": (64, 8, 8)}, 11, (32, 32), dense=True)
        >>> interpreter(features)                   # (B, 11, 32, 32)
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        num_classes: int,
        size: Size,
        *,
        width: int = 256,
        dropout: float = 0.1,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.names = sorted(shapes, key=lambda name: shapes[name][1])  # from coarse to fine
        self.size, self.dense = size, dense
        self.laterals = nn.ModuleList(nn.Conv2d(shapes[name][0], width, 1) for name in self.names)
        self.mixers = nn.ModuleList(_separable(width * (1 if i == 0 else 2), width) for i in range(len(self.names)))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1) if dense else nn.Linear(width, num_classes)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K, H, W), or (B, K), of maps (B, C, h, w)."""
        state: Tensor | None = None
        for name, lateral, mixer in zip(self.names, self.laterals, self.mixers, strict=True):
            value = lateral(features[name])
            state = mixer(value if state is None else torch.cat([value, resize(state, value.shape[-2:])], 1))
        assert state is not None
        state = self.dropout(state)
        return resize(self.classifier(state).float(), self.size) if self.dense else self.classifier(state.mean((2, 3))).float()


def _separable(width_in: int, width: int) -> nn.Sequential:
    """Depthwise and pointwise convolution, GroupNorm, swish."""
    depthwise = nn.Conv2d(width_in, width_in, 3, padding=1, groups=width_in, bias=False)
    return nn.Sequential(
        depthwise, nn.Conv2d(width_in, width, 1, bias=False), nn.GroupNorm(math.gcd(32, width), width), nn.SiLU(inplace=True)
    )


def train_interpreter(
    interpreter: Interpreter,
    features: Callable[[Tensor, torch.Generator], dict[str, Tensor]],
    x0: Tensor,
    labels: Tensor,
    config: TrainConfig,
    folder: Path,
    *,
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> Any:
    """Train an interpreter on a teacher's features of labelled pictures, or go on with what is in the folder.

    Args:
        features: `(x0, generator) -> maps`, as `TeacherLevels` gives them; noise is drawn anew in each step, which augments.
        x0: clean samples (N, ...) of the labelled pictures.
        labels: classes (N,), or label maps (N, H, W).

    Returns:
        The average of its weights, frozen.
    """

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(x0), (min(config.batch_size, len(x0)),), generator=generator)
        logits = model(features(x0[rows].to(device), generator))
        return label_loss(logits, labels[rows].to(device))

    best = fit(interpreter, loss, config, folder, name="interpreter", resume=True, device=device, ranks=ranks)
    return best.requires_grad_(False)
