"""Augmentation that gradients pass: a discriminator on few pictures must not learn them by heart.

Colour, translation and cutout, drawn for each picture (DiffAugment: Zhao et al. 2020, arXiv 2006.10738), with the sizes of
StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515): translations up to an eighth of a side, and a fifth of a side cut out.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRANSLATION = 0.125
CUTOUT = 0.2


DRAWS = 7  # random numbers that the augmentation of one picture takes


def diff_augment(x: Tensor, draws: Tensor) -> Tensor:
    """Augmented pictures (B, 3, H, W) of pictures in [-1, 1]; differentiable in x.

    Args:
        draws: (7, B), uniform in [0, 1).
    """
    return cutout(translated(coloured(x, draws[:3]), draws[3:5]), draws[5:])


def coloured(x: Tensor, draws: Tensor) -> Tensor:
    """Brightness shifted by U(-.5, .5), saturation scaled by U(0, 2), contrast by U(.5, 1.5); draws (3, B)."""
    brightness, saturation, contrast = draws.to(x)[..., None, None, None]
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (x - mean)


def translated(x: Tensor, draws: Tensor) -> Tensor:
    """Moved by whole pixels, up to an eighth of each side; 0 moves in; draws (2, B)."""
    for dim, draw in zip((2, 3), draws.to(x.device), strict=True):
        size = x.shape[dim]
        most = round(TRANSLATION * size)
        shift = torch.floor(draw * (2 * most + 1)).long() - most
        source = torch.arange(size, device=x.device) - shift[:, None]
        shape = (len(x), 1, size, 1) if dim == 2 else (len(x), 1, 1, size)
        inside = ((source >= 0) & (source < size)).reshape(shape)
        x = x.take_along_dim(source.clamp(0, size - 1).reshape(shape), dim) * inside
    return x


def cutout(x: Tensor, draws: Tensor) -> Tensor:
    """A rectangle of a fifth of each side, its middle anywhere in the picture, set to 0; draws (2, B)."""
    cut = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for dim, draw in zip((2, 3), draws.to(x.device), strict=True):
        size = x.shape[dim]
        width = max(1, round(CUTOUT * size))
        first = torch.floor(draw * size).long() - width // 2
        offset = torch.arange(size, device=x.device) - first[:, None]
        shape = (len(x), 1, size, 1) if dim == 2 else (len(x), 1, 1, size)
        cut = cut & ((offset >= 0) & (offset < width)).reshape(shape)
    return x * ~cut
