"""DreamTeacher's regressors: from a backbone's feature levels to maps with which the teacher's can be compared.

    ppm-fpn   C5 <- conv_3x3 [C5, up(conv_1x1 pool_s(C5)), s = 1, 2, 3, 6]               (Zhao et al. 2017, arXiv 1612.01105)
    fpn       P_l <- conv_3x3 (conv_1x1 C_l + up(P_{l+1}))                               (Lin et al. 2017, arXiv 1612.03144)
    simple    P_l <- conv_3x3 conv_1x1 resample_l(C), from the last map of a plain ViT  (Li et al. 2022, arXiv 2203.16527)

and a 1 x 1 convolution from P_l to the channels of each teacher map on it. BatchNorm and ReLU follow each convolution but this last
one. A tap goes with the level whose map is as large as its own. The paper's regressor is ppm-fpn of width 256. Regressors are
thrown away after the distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.errors import unknown

REGRESSORS = ("ppm-fpn", "fpn", "simple")
_BINS = (1, 2, 3, 6)

Size = tuple[int, int]


def conv(width_in: int, width: int, side: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    layer = nn.Conv2d(width_in, width, side, padding=side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) of another size, bilinearly."""
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """What a map (B, C, h, w) looks like from afar, beside the map itself: (B, width, h, w)."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        # No BatchNorm after a pool to one value, of which a batch of one has no variance.
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(width_in, width, 1), nn.ReLU(inplace=True)) for _ in _BINS)
        self.bottleneck = conv(width_in + width * len(_BINS), width, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        pooled = [
            resize(stage(F.adaptive_avg_pool2d(x, (min(bins, size[0]), min(bins, size[1])))), size)
            for bins, stage in zip(_BINS, self.stages, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], 1))


class FeaturePyramid(nn.Module):
    """A pyramid P_l (B, width, h_l, w_l) of levels C_l from fine to coarse.

    Args:
        channels: of each level.
        width: of the pyramid.
        pooling: with pyramid pooling on the coarsest level.
    """

    def __init__(self, channels: Sequence[int], width: int, pooling: bool) -> None:
        super().__init__()
        self.pool = PyramidPooling(channels[-1], width) if pooling else conv(channels[-1], width, 1)
        self.laterals = nn.ModuleList(conv(count, width, 1) for count in channels[:-1])
        self.outputs = nn.ModuleList(conv(width, width, 3) for _ in channels)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        states = [self.pool(levels[-1])]
        for lateral, value in zip(reversed(self.laterals), reversed(levels[:-1]), strict=True):
            states.insert(0, lateral(value) + resize(states[0], value.shape[-2:]))
        return [output(state) for output, state in zip(self.outputs, states, strict=True)]


class SimplePyramid(nn.Module):
    """A pyramid of the last map (B, C, h, w) of a network with one resolution: of 4, 2, 1 and 1/2 times its size.

    Args:
        channels: C.
        width: of the pyramid.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = max(1, channels // 2), max(1, channels // 4)
        finer = [nn.ConvTranspose2d(channels, half, 2, 2), nn.BatchNorm2d(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2)]
        self.scales = nn.ModuleList(
            [nn.Sequential(*finer), nn.ConvTranspose2d(channels, half, 2, 2), nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)]
        )
        widths = (quarter, half, channels, channels)
        self.outputs = nn.ModuleList(nn.Sequential(conv(count, width, 1), conv(width, width, 3)) for count in widths)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        return [output(scale(levels[-1])) for scale, output in zip(self.scales, self.outputs, strict=True)]


class Regressor(nn.Module):
    """From a backbone's levels to the teacher's maps.

    Args:
        kind: one of `REGRESSORS`.
        levels: (C, h, w) of each level of the backbone, from fine to coarse.
        targets: (C, h, w) of each tap of the teacher.
        width: of the pyramid; 256 in the paper.

    Attributes:
        sizes: (h, w) of the pyramid's maps.

    Raises:
        ValueError: an unknown kind, or a tap whose map is as large as none of the pyramid's.

    Example:
        >>> regressor = Regressor("ppm-fpn", [(64, 16, 16), (128, 8, 8)], {"block.6": (128, 8, 8)})
        >>> regressor(levels)["block.6"]            # (B, 128, 8, 8)
    """

    def __init__(
        self, kind: str, levels: Sequence[Sequence[int]], targets: Mapping[str, Sequence[int]], width: int = 256
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in REGRESSORS:
            raise unknown("regressor", kind, REGRESSORS)
        sizes: list[Size] = [(shape[1], shape[2]) for shape in levels]
        if kind == "simple":
            height, width_ = sizes[-1]
            sizes = [(4 * height, 4 * width_), (2 * height, 2 * width_), (height, width_), (-(-height // 2), -(-width_ // 2))]
            self.pyramid: nn.Module = SimplePyramid(levels[-1][0], width)
        else:
            self.pyramid = FeaturePyramid([shape[0] for shape in levels], width, kind == "ppm-fpn")
        self.sizes, self.width = sizes, width
        self.places = {name: matching_level(name, shape, sizes) for name, shape in targets.items()}
        self.heads = nn.ModuleList(nn.Conv2d(width, shape[0], 1) for shape in targets.values())

    def forward(self, levels: Sequence[Tensor]) -> dict[str, Tensor]:
        """The student's version of each tap's map."""
        return self.read(self.pyramid(levels))

    def read(self, pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
        """The same of a pyramid that is there."""
        return {name: head(pyramid[level]) for (name, level), head in zip(self.places.items(), self.heads, strict=True)}


def matching_level(name: str, shape: Sequence[int], sizes: Sequence[Size]) -> int:
    """The number of the level, of `sizes` (h, w), with maps as large as those (C, h, w) of a tap.

    Raises:
        ValueError: there is none.
    """
    size = (shape[1], shape[2])
    if size not in sizes:
        there = ", ".join(f"{h} x {w}" for h, w in sizes)
        raise ValueError(
            f"The tap {name!r} gives {size[0]} x {size[1]} maps, but the backbone has {there}. "
            "Name another tap, or give the backbone pictures of another size."
        )
    return list(sizes).index(size)
