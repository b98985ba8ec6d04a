"""Heads of a discriminator: a map of features (B, C, h, w) and a condition (B, D) to one logit for each position, (B, h w).

    conv2d       a 1x1 bottleneck to a few channels, then residual 3x3 convolutions with group normalisation, modulated by the
                 condition (FiLM: Perez et al. 2017, arXiv 1709.07871). Any aspect, any width of features.
    mlp          three layers at each position on its own, the condition beside the features; for vectors, whose maps are 1 x 1
    stylegan-t   the head of StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515), which ADD has: dense convolutions of
                 9 tokens in a row. They have 9 C^2 weights and filter along rows only; here for comparison.

Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) bounds how steep both are. Group normalisation sees one sample, so
real and generated ones may share a batch; the batch statistics of the StyleGAN-T head then leak from one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

GROUPS = 8  # of the group normalisation
EMBEDDING = 128  # width of what the condition is embedded to
VIRTUAL_BATCH = 8  # samples that share statistics in the StyleGAN-T head
MAPS = 64  # that head's maps, weighted by the condition


class ConvHead(nn.Module):
    """The default head: 1x1 to `width` channels, `depth` residual 3x3 convolutions, 1x1 to a logit.

    Args:
        channels: C of the features.
        cond_dim: D of the condition; 0 has none.
        width: channels inside, a multiple of 8.
        depth: residual convolutions.
        spectral: spectral normalisation of every convolution and linear layer.

    Raises:
        ValueError: a width that the groups do not divide, or a negative depth.

    Example:
        >>> ConvHead(2240, 768)(torch.randn(2, 2240, 32, 24), torch.randn(2, 768)).shape
        torch.Size([2, 768])
    """

    def __init__(self, channels: int, cond_dim: int, *, width: int = 256, depth: int = 1, spectral: bool = True) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS or depth < 0:
            raise ValueError(f"width={width} must be a positive multiple of {GROUPS}, and depth={depth} not negative.")
        normed: Callable[[nn.Module], nn.Module] = spectral_norm if spectral else lambda module: module
        self.conv_in = normed(nn.Conv2d(channels, width, 1))
        self.embed = nn.Sequential(normed(nn.Linear(cond_dim, EMBEDDING)), nn.SiLU()) if cond_dim else None
        self.blocks = nn.ModuleList([_Block(width, EMBEDDING if cond_dim else 0, normed) for _ in range(depth)])
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.conv_out = normed(nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Logits (B, h w) of maps x (B, C, h, w) and conditions (B, D)."""
        h = self.conv_in(x)
        c = None if self.embed is None else self.embed(cond)
        for block in self.blocks:
            h = block(h, c)
        return self.conv_out(nn.functional.silu(self.norm_out(h))).flatten(1)


class _Block(nn.Module):
    """h + conv(silu((1 + scale) norm(h) + shift)), with scale and shift from the condition."""

    def __init__(self, width: int, cond_dim: int, normed: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.film = normed(nn.Linear(cond_dim, 2 * width)) if cond_dim else None
        self.conv = normed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        inside = self.norm(h)
        if self.film is not None and c is not None:
            scale, shift = self.film(c)[..., None, None].chunk(2, dim=1)
            inside = (1 + scale) * inside + shift
        return h + self.conv(nn.functional.silu(inside))


class MLPHead(nn.Module):
    """A multilayer perceptron at each position, for features that are vectors: there is nothing for a convolution to look at.

    Args:
        channels: C of the features.
        cond_dim: D of the condition, appended to the features; 0 has none.
        width: of the two hidden layers.
        spectral: spectral normalisation of every layer.
    """

    def __init__(self, channels: int, cond_dim: int, *, width: int = 256, spectral: bool = True) -> None:
        super().__init__()
        layers = [nn.Linear(channels + cond_dim, width), nn.Linear(width, width), nn.Linear(width, 1)]
        first, second, third = (spectral_norm(layer) if spectral else layer for layer in layers)
        self.layers = nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), third)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Logits (B, h w) of maps x (B, C, h, w) and conditions (B, D)."""
        tokens = x.flatten(2).transpose(1, 2)
        conds = cond[:, None].expand(-1, tokens.shape[1], -1)
        return self.layers(torch.cat([tokens, conds], 2)).squeeze(2)


class StyleGANTHead(nn.Module):
    """The head of StyleGAN-T, with a plain linear layer for the condition, as the public ports of LADD have it.

    Args:
        channels: C of the features.
        cond_dim: D of the condition; 0 has none, and one map instead of 64.

    Raises:
        ValueError: in the call, maps of fewer than 4 positions, which a circular convolution of 9 cannot pad.
    """

    def __init__(self, channels: int, cond_dim: int) -> None:
        super().__init__()
        self.conv_in = _conv_block(channels, 1)
        self.residual = _conv_block(channels, 9)
        self.conv_out = spectral_norm(nn.Conv1d(channels, MAPS if cond_dim else 1, 1))
        self.project = nn.Linear(cond_dim, MAPS) if cond_dim else None

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Logits (B, h w) of maps x (B, C, h, w) and conditions (B, D)."""
        tokens = x.flatten(2)
        if tokens.shape[2] < 4:
            raise ValueError(f"The stylegan-t head needs 4 positions or more, not {tuple(x.shape[2:])}. Use the conv2d head.")
        h = self.conv_in(tokens)
        h = (self.residual(h) + h) / math.sqrt(2)
        maps = self.conv_out(h)
        if self.project is None:
            return maps[:, 0]
        return (maps * self.project(cond)[..., None]).sum(1) / math.sqrt(MAPS)


def _conv_block(channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(spectral_norm(conv), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class LocalBatchNorm(nn.Module):
    """Normalisation over tokens and up to 8 samples, the same in training and evaluation.

    A batch of B samples is split into ceil(B / 8) groups, as equal as possible: 12 are 6 and 6, and 9 are 5 and 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) of the same shape."""
        groups = x.tensor_split(math.ceil(len(x) / VIRTUAL_BATCH))
        normed = [nn.functional.batch_norm(group, None, None, training=True) for group in groups]
        return torch.cat(normed) * self.weight + self.bias


HEADS = {"conv2d": ConvHead, "mlp": MLPHead, "stylegan-t": StyleGANTHead}
