"""Networks that understand noisy samples: an ADM-style encoder conditioned on the noise level, and heads on its features.

They see the variance-preserving variable z = x / sqrt(alpha^2 + sigma^2) and the noise-to-signal ratio sigma / alpha, so one
network serves every scheduler (VP, VE, flow). The blocks are those of Dhariwal & Nichol 2021 (ADM, arXiv 2105.05233, table 4):
residual blocks with scale-shift conditioning, residual down-sampling, 64-channel heads of attention, attention pooling.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from genkit import zoo
from genkit.checkpoints import check_folder
from genkit.levels import Level, broadcast

# The noise-to-signal ratios of the paper's linear beta schedule (Kim et al. 2023, arXiv 2211.17091), times 1e-5 and 1.
SIGMA_MIN, SIGMA_MAX = 0.0010005, 152.167


def coordinates(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """(z, ratio): the variance-preserving variable (B, ...) and the noise-to-signal ratio (B,) of x at its level."""
    ratio = torch.as_tensor(level.sigma, dtype=torch.float64) / torch.as_tensor(level.alpha, dtype=torch.float64)
    return x / broadcast(level.norm, x), ratio.to(x.device).expand(len(x))


def condition_embedding(condition: dict[str, int], channels: int) -> nn.Module:
    """A module that `embed_condition` applies: an embedding of K classes, or a small network on vectors of width D."""
    if "num_classes" in condition:
        return nn.Embedding(condition["num_classes"], channels)
    width = condition["channels"]
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels))


def embed_condition(embedding: nn.Module, condition: Tensor) -> Tensor:
    """Vectors (B, C) of labels (B,), of token embeddings (B, L, D), which are averaged, or of vectors (B, D)."""
    if isinstance(embedding, nn.Embedding):
        return embedding(condition)
    tokens = condition.to(next(embedding.parameters()).dtype)
    return embedding(tokens.mean(1) if tokens.ndim == 3 else tokens)


class NoiseLevelEmbedding(nn.Module):
    """The noise-to-signal ratio (B,) as a vector (B, C), uniform in its logarithm from `SIGMA_MIN` to `SIGMA_MAX`.

    Args:
        channels: of the sinusoid; the vector has four times as many.
        condition: {"num_classes": K} for labels (B,), {"channels": D} for token embeddings (B, L, D) or vectors (B, D); None for
            neither.
    """

    def __init__(self, channels: int, condition: dict[str, int] | None = None) -> None:
        super().__init__()
        self.sinusoid = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(channels, 4 * channels)
        self.condition = None if condition is None else condition_embedding(condition, 4 * channels)

    def forward(self, ratio: Tensor, condition: Tensor | None = None) -> Tensor:
        fraction = (ratio.log() - math.log(SIGMA_MIN)) / math.log(SIGMA_MAX / SIGMA_MIN)
        weight = next(self.mlp.parameters())
        h = self.mlp(self.sinusoid(999 * fraction.clamp(0, 1).float()).to(weight.dtype))
        if self.condition is None:
            return h
        if condition is None:
            raise ValueError("This network is conditional, but it was given no condition.")
        return h + embed_condition(self.condition, condition)


class NoisyEncoder(nn.Module):
    """Features (B, C', h', w') of noisy samples x (B, C, h, w) at a level, in any scheduler's variable.

    Args:
        in_channels: of the sample.
        block_out_channels: width of each resolution; every one after the first halves it.
        layers_per_block: residual blocks at each resolution.
        attention: at which resolutions attention follows each block; all by default.
        attention_head_dim: channels of an attention head (64 in ADM).
        norm_num_groups: of the group normalisation (32 in ADM).
        condition: see `NoiseLevelEmbedding`.
    """

    def __init__(
        self,
        in_channels: int,
        block_out_channels: tuple[int, ...] | list[int],
        layers_per_block: int = 2,
        attention: tuple[bool, ...] | list[bool] | None = None,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        condition: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        width = block_out_channels[0]
        embedding = 4 * width
        self.level = NoiseLevelEmbedding(width, condition)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        attention = [True] * len(block_out_channels) if attention is None else attention
        norms: dict[str, Any] = {"groups": norm_num_groups, "temb_channels": embedding, "time_embedding_norm": "scale_shift"}

        def attend(channels: int) -> Attention:
            head = min(attention_head_dim, channels)
            return Attention(
                channels,
                heads=channels // head,
                dim_head=head,
                norm_num_groups=norm_num_groups,
                residual_connection=True,
                bias=True,
            )

        blocks: list[nn.Module] = []
        for i, width_out in enumerate(block_out_channels):
            for _ in range(layers_per_block):
                blocks.append(ResnetBlock2D(in_channels=width, out_channels=width_out, **norms))
                width = width_out
                if attention[i]:
                    blocks.append(attend(width))
            if i + 1 < len(block_out_channels):
                blocks.append(ResnetBlock2D(in_channels=width, out_channels=width, down=True, **norms))
        middle = {"in_channels": width, "out_channels": width}
        blocks += [ResnetBlock2D(**middle, **norms), attend(width), ResnetBlock2D(**middle, **norms)]
        self.blocks = nn.ModuleList(blocks)
        self.out_channels = width

    def forward(self, x: Tensor, level: Level, condition: Tensor | None = None) -> Tensor:
        z, ratio = coordinates(x, level)
        return self.encode(z, self.level(ratio, condition))

    def encode(self, z: Tensor, embedding: Tensor) -> Tensor:
        """The same of the variance-preserving variable z and an embedding (B, C) that `level` made."""
        h = self.conv_in(z.to(self.conv_in.weight.dtype))
        for block in self.blocks:
            h = block(h, embedding) if isinstance(block, ResnetBlock2D) else block(h)
        return h


class PooledHead(nn.Module):
    """Outputs (B, K) of a feature map (B, C, h, w): normalisation, attention pooling with the mean as query, a linear layer."""

    def __init__(self, channels: int, out_features: int, *, attention_head_dim: int = 64, norm_num_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.pool = nn.MultiheadAttention(channels, max(1, channels // attention_head_dim), batch_first=True)
        self.linear = nn.Linear(channels, out_features)

    def forward(self, h: Tensor) -> Tensor:
        tokens = nn.functional.silu(self.norm(h)).flatten(2).transpose(1, 2)
        mean = tokens.mean(1, keepdim=True)
        pooled, _ = self.pool(mean, torch.cat([mean, tokens], dim=1), torch.cat([mean, tokens], dim=1), need_weights=False)
        return self.linear(pooled[:, 0])


Network = TypeVar("Network", bound=ModelMixin)


def load_network(kind: type[Network], name: str | Path, what: str) -> Network:
    """A network of a class: an embedded one by name, or a folder. Float32, in eval mode, frozen.

    Args:
        what: the kind of network, for the message.

    Raises:
        ValueError: no such model, or the folder is damaged or holds another model.
    """
    folder = Path(name) if Path(name).is_dir() and str(name) not in zoo.names() else zoo.path(str(name))
    check_folder(folder)
    found = kind.load_config(folder).get("_class_name")
    if found != kind.__name__:
        raise ValueError(f"{str(name)!r} holds a {found}, which is no {what}.")
    return kind.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def require_shape(x: Tensor, network: Any, what: str) -> None:
    """Refuse samples of another shape than a network says that it was trained on.

    Raises:
        ValueError: names both shapes.
    """
    expected = getattr(getattr(network, "config", None), "sample_shape", None)
    if expected is not None and tuple(x.shape[1:]) != tuple(expected):
        raise ValueError(
            f"The {what} was trained on samples {tuple(expected)}, but these are {tuple(x.shape[1:])}. "
            "Use it with the model and the size that it was trained for."
        )


_interned: WeakValueDictionary[str, NoisyEncoder] = WeakValueDictionary()


def interned(encoder: NoisyEncoder) -> NoisyEncoder:
    """The encoder of these very weights that is in memory already, or this one: energies on one trunk can share its evaluation."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return _interned.setdefault(digest.hexdigest(), encoder)


def random_levels(count: int, generator: torch.Generator, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Level:
    """`count` levels, variance exploding, whose noise-to-signal ratio is log-uniform.

    This is the density beta(t) / (1 - abar(t)) of discriminator guidance (Kim et al. 2023, section 3.3), for every schedule.
    """
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    ratio = sigma_min * (sigma_max / sigma_min) ** u
    return Level(torch.ones_like(ratio), ratio, torch.zeros_like(ratio))
