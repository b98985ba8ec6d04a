"""DreamTeacher's student: an ordinary backbone of timm, with the regressor and the label head that training puts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.distill.dreamteacher_interpreter import Interpreter
from genkit.distill.dreamteacher_regressors import Regressor
from genkit.errors import unknown

FINEST = 4  # pixels for one step in the finest level that regressors use: C2 of C2 to C5

Size = tuple[int, int]


def create_backbone(name: str, size: Size) -> nn.Module:
    """A network of timm with random weights, for pictures of a size (height, width), without classifier.

    Raises:
        ValueError: timm has no such model, or it does not take the size.
        ImportError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("Backbones come from timm. Install it with: pip install 'genkit-diffusion[train]'") from error
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models())
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    options: dict[str, Any] = {"img_size": size} if fixed else {}
    try:
        return timm.create_model(name, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"The backbone {name!r} cannot be made for {size[0]} x {size[1]} pictures: {error}.") from error


class Backbone(nn.Module):
    """A network of timm as levels of features of pictures in [-1, 1].

    Levels are the last map of each resolution from 4 pixels a step on; of a network with one resolution its last map.

    Args:
        network: with `forward_intermediates`, as timm's networks have it.
        size: (height, width) of the pictures.

    Attributes:
        levels: (C, h, w) of each level, from fine to coarse.

    Raises:
        ValueError: a network without intermediate features, or one that does not take the size.

    Example:
        >>> backbone = Backbone(timm.create_model("resnet18", num_classes=0), (64, 64))
        >>> [level.shape for level in backbone(pictures)]    # C2 to C5: 64, 128, 256 and 512 channels
    """

    def __init__(self, network: nn.Module, size: Size) -> None:
        super().__init__()
        info = getattr(network, "feature_info", None)
        if info is None or not hasattr(network, "forward_intermediates"):
            raise ValueError(f"{type(network).__name__} gives no intermediate features. Use another backbone of timm.")
        self.network, self.size = network, size
        last = {entry["reduction"]: number for number, entry in enumerate(info)}
        coarse = {reduction: number for reduction, number in last.items() if reduction >= FINEST} or last
        self.indices = sorted(coarse.values())
        training = network.training
        try:
            with torch.no_grad():
                found = self.eval()(torch.zeros(1, 3, *size, device=next(network.parameters()).device))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{type(network).__name__} does not take {size[0]} x {size[1]} pictures ({reason}). Give another size."
            ) from error
        self.train(training)
        self.levels = [tuple(value.shape[1:]) for value in found]

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Levels (B, C, h, w) of pictures (B, 3, H, W) in [-1, 1]."""
        if tuple(pictures.shape[-3:]) != (3, *self.size):
            raise ValueError(f"Pictures have shape {tuple(pictures.shape)}, but (B, 3, {self.size[0]}, {self.size[1]}) is needed.")
        network: Any = self.network
        return network.forward_intermediates(pictures, indices=self.indices, intermediates_only=True, output_fmt="NCHW")


class DreamStudent(nn.Module):
    """A backbone that learns the teacher's features, and its labels.

    Args:
        backbone: the network that will be kept.
        targets: (C, h, w) of each of the teacher's taps.
        regressor: its kind, "auto" for "simple" on a backbone of one resolution and "ppm-fpn" on others.
        width: of the regressor.
        num_classes: of the label branch; 0 for none.
        dense: the label branch labels pixels.

    Raises:
        ValueError: a tap whose maps are as large as none of the backbone's.

    Example:
        >>> student = DreamStudent(backbone, teacher.shapes)
        >>> features, logits = student(pictures)
    """

    def __init__(
        self,
        backbone: Backbone,
        targets: Mapping[str, Sequence[int]],
        *,
        regressor: str = "auto",
        width: int = 256,
        num_classes: int = 0,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        kind = regressor if regressor != "auto" else ("simple" if len(backbone.levels) == 1 else "ppm-fpn")
        self.regressor = Regressor(kind, backbone.levels, targets, width)
        self.labels: nn.Module | None = None
        self.dense = dense
        if num_classes and dense:
            maps = {str(i): (width, *size) for i, size in enumerate(self.regressor.sizes)}
            self.labels = Interpreter(maps, num_classes, backbone.size, width=width, dense=True)
        elif num_classes:
            self.labels = nn.Linear(backbone.levels[-1][0], num_classes)

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The student's version of the teacher's maps, and logits (B, K) or (B, K, H, W) of the label branch, if there is one."""
        levels = self.backbone(pictures)
        pyramid = self.regressor.pyramid(levels)
        logits = None
        if self.labels is not None:
            logits = self.labels({str(i): v for i, v in enumerate(pyramid)} if self.dense else levels[-1].mean((2, 3)))
        return self.regressor.read(pyramid), logits
