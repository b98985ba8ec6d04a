"""PointSetTransformer: a diffusion network of point clouds that sees the whole set, at a cost that grows with its size alone.

    L <- L + Attention(L, X);   L <- L + Attention(L, L);   L <- L + MLP(L);
    X <- X + Attention(X, L);   X <- X + MLP(X)                                                          in each block

L are a few learned latents through which the points X hear of each other (induced set attention: Lee et al. 2019, arXiv
1810.00825), and one more for each part that the whole shall be made of, if those are told (`genkit.assembly.descriptors`). Points
enter by Fourier features of their coordinates, parts by those of their descriptors; time, class and the sum over the parts by
adaptive layer norms (Peebles & Xie 2022, arXiv 2212.09748). There are no positions: the output turns over with the points, and
any number of them will do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

OCTAVES = 6  # of Fourier features: wavelengths from 4 down to 1/8
MANY = 8  # parts: what sums over parts are divided by


@dataclasses.dataclass
class PointDenoiserOutput(BaseOutput):
    """What a denoiser of point clouds returns: `sample` (B, N, 3), of the kind that its scheduler says."""

    sample: Tensor


class PointSetTransformer(ModelMixin, ConfigMixin):
    """Denoiser of clouds.

    Args:
        categories: names of the classes, in the order of their numbers; one number more stands for none.
        width, layers, heads: of the transformer.
        latents: that the points hear of each other through.
        sample_size: points of the clouds that it is trained on. It takes any number, but sees how many there are.
        part_features: numbers that describe a part; 0 for a network that is not told of parts.
        surface_area: of its clouds, where that is what they have in common; None where it is a standard deviation of 1.

    Example:
        >>> net = PointSetTransformer(["chair", "table"])
        >>> net(torch.randn(8, 512, 3), torch.full((8,), 500), class_labels=torch.zeros(8, dtype=torch.long)).sample.shape
        torch.Size([8, 512, 3])
    """

    @register_to_config
    def __init__(
        self,
        categories: Sequence[str],
        width: int = 64,
        layers: int = 6,
        heads: int = 4,
        latents: int = 32,
        sample_size: int = 512,
        part_features: int = 0,
        surface_area: float | None = None,
    ) -> None:
        super().__init__()
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.class_embedding = nn.Embedding(len(categories) + 1, width)
        self.proj_in = nn.Linear(3 + 6 * OCTAVES, width)
        self.inducing = nn.Parameter(torch.randn(latents, width) * width**-0.5)
        if part_features:
            described = (1 + 2 * OCTAVES) * part_features
            self.part_in = nn.Sequential(nn.Linear(described, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
            self.part_embedding = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = _AdaptiveNorm(width)
        self.proj_out = nn.Linear(width, 3)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        parts: Tensor | None = None,
        part_mask: Tensor | None = None,
    ) -> PointDenoiserOutput:
        """The scheduler's kind of output (B, N, 3) of noisy clouds (B, N, 3) at timesteps (B,).

        Args:
            class_labels: (B,), or None for no class; the number after the last one stands for none too.
            parts: descriptors (B, P, part_features) of the parts, or None if they are not told.
            part_mask: (B, P), false for rows of `parts` that are none.

        Raises:
            ValueError: parts for a network that is not told of any.
        """
        if class_labels is None:
            class_labels = torch.full((len(sample),), len(self.config.categories), device=sample.device)
        condition = self.time_embedding(self.time_proj(timestep).to(sample)) + self.class_embedding(class_labels)
        points, latents, told = self.proj_in(fourier(sample)), self.inducing.expand(len(sample), -1, -1), None
        if parts is not None:
            if not self.config.part_features:
                raise ValueError("This network is not told of parts. Leave `parts` out.")
            tokens = self.part_in(fourier(parts.to(sample)))
            latents = torch.cat([latents, tokens], 1)
            if part_mask is not None:
                tokens = tokens * part_mask[..., None]
                told = F.pad(part_mask, (self.config.latents, 0), value=True)[:, None, None]
            condition = condition + self.part_embedding(tokens.sum(1) / MANY)
        elif self.config.part_features:
            condition = condition + self.part_embedding(torch.zeros_like(condition))
        condition = F.silu(condition)
        for block in self.blocks:
            points, latents = block(points, latents, condition, told)
        return PointDenoiserOutput(sample=self.proj_out(self.norm(points, condition)))


def fourier(y: Tensor) -> Tensor:
    """Numbers (..., D) and their sines and cosines (..., D + 2 * OCTAVES * D)."""
    angles = (y[..., None] * (torch.pi / 2 * 2.0 ** torch.arange(OCTAVES, device=y.device)).to(y)).flatten(-2)
    return torch.cat([y, angles.sin(), angles.cos()], -1)


class _AdaptiveNorm(nn.Module):
    """Layer norm whose shift and scale come from the condition (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.linear(condition)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class _Attention(nn.Module):
    """Of queries (B, N, C) on context (B, M, C), or on what a mask (B, 1, 1, M) leaves of it, fused."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv, self.to_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), *self.to_kv(context).chunk(2, -1))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.gather, self.spread = _Attention(width, heads), _Attention(width, heads)
        self.norm_latents, self.norm_spread = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_points, self.norm_mlp = _AdaptiveNorm(width), _AdaptiveNorm(width)
        self.mix, self.mlp = _mlp(width), _mlp(width)
        self.exchange, self.norm_exchange, self.norm_mixed = _Attention(width, heads), _AdaptiveNorm(width), _AdaptiveNorm(width)

    def forward(self, points: Tensor, latents: Tensor, condition: Tensor, told: Tensor | None) -> tuple[Tensor, Tensor]:
        normed = self.norm_points(points, condition)
        latents = latents + self.gather(self.norm_latents(latents), normed)
        exchanged = self.norm_exchange(latents, condition)
        latents = latents + self.exchange(exchanged, exchanged, told)
        latents = latents + self.mix(self.norm_mixed(latents, condition))
        points = points + self.spread(normed, self.norm_spread(latents), told)
        return points + self.mlp(self.norm_mlp(points, condition)), latents


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
