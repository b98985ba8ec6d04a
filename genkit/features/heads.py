"""Classification heads on features of frozen diffusion networks (Mukhopadhyay et al. 2023, arXiv 2311.17921).

    linear      W vec(pool_p(f)) + b
    attention   z(t) = transformer([cls; proj_1(norm_1(pool(f_1(t)))); proj_2(norm_2(pool(f_2(t)))); ...])
                W [z_cls(t_1); z_cls(t_2); ...] + b
    feedback    f_e += resize(relu(bn(conv_1x1(f_d)))) in a second pass, at encoder blocks e; f_d from the decoder of the first

`AttentionHead` on one block and one noise level is the paper's attention head, on several its DifFormer; with `FeedbackHead` it
is DifFeed. On ADM-256 and 1000 classes they have 4,097,000 (linear, p = 2), 27,786,216 (attention), 31,802,344 (DifFormer) and,
for the feedback convolutions, 2,759,680 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.features.extractor import shrink

Shapes = Mapping[str, Sequence[int]]

# Taps go by name, never in the order of a mapping: a saved configuration is sorted.


def _levels(features: Mapping[str, Tensor], name: str, shape: Sequence[int], levels: int) -> list[Tensor]:
    """The tensors (B, *shape) of one tap, one for each noise level."""
    value = features.get(name)
    if value is None:
        raise ValueError(f"The head needs features of the tap {name!r}, but got those of {', '.join(features) or 'none'}.")
    values = (
        [value] if levels == 1 and value.ndim == len(shape) + 1 else list(value.unbind(1)) if value.ndim == len(shape) + 2 else []
    )
    if len(values) != levels or tuple(values[0].shape[1:]) != tuple(shape):
        wanted = ("B", *([levels] if levels > 1 else []), *shape)
        raise ValueError(f"Features of the tap {name!r} have shape {tuple(value.shape)}, but the head needs {wanted}.")
    return values


class LinearHead(ModelMixin, ConfigMixin):
    """A linear classifier of pooled features; of several taps and noise levels, of all of them side by side.

    Args:
        shapes: (C, h, w), or (C,) of what is pooled to vectors, by tap.
        num_classes: K.
        levels: noise levels of the features.
        pool: steps along each side that maps are averaged to.

    Example:
        >>> head = LinearHead({"block.24": (1024, 16, 16)}, 1000)
        >>> head({"block.24": features})          # (B, 1024, 16, 16) -> (B, 1000)
    """

    @register_to_config
    def __init__(self, shapes: Shapes, num_classes: int, levels: int = 1, pool: int = 2) -> None:
        super().__init__()
        width = sum(math.prod([shape[0], *(min(pool, side) for side in shape[1:])]) for shape in shapes.values())
        self.fc = nn.Linear(levels * width, num_classes)

    def flatten(self, features: Mapping[str, Tensor]) -> Tensor:
        """The vectors (B, D) that are classified."""
        values = [
            v for name, shape in sorted(self.config.shapes.items()) for v in _levels(features, name, shape, self.config.levels)
        ]
        return torch.cat([(shrink(v, self.config.pool) if v.ndim == 4 else v).flatten(1) for v in values], dim=1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K)."""
        return self.fc(self.flatten(features).to(self.fc.weight.dtype))


class AttentionHead(ModelMixin, ConfigMixin):
    """A small transformer over the features of one or several blocks, shared by one or several noise levels.

    Each map is pooled, normalised over (C, h, w) and projected to tokens; the tokens of all blocks together pass the transformer
    with a class token, without positions (the maps' normalisation has weights for each position). Pre-norm blocks, MLP ratio 4.

    Args:
        shapes: (C, h, w) by tap.
        num_classes: K.
        levels: noise levels of the features; the class tokens of all are classified side by side.
        width, num_heads, depth: of the transformer; 1024, 8 and 2 in the paper.
        grid: maps are averaged to at most so many steps along a side; 16 in the paper.

    Raises:
        ValueError: features that are no maps, or a width that the heads do not divide.

    Example:
        >>> AttentionHead({"mid": (1024, 8, 8), "block.24": (1024, 16, 16), "block.30": (512, 64, 64)}, 1000, levels=3)
    """

    @register_to_config
    def __init__(
        self,
        shapes: Shapes,
        num_classes: int,
        levels: int = 1,
        width: int = 1024,
        num_heads: int = 8,
        depth: int = 2,
        grid: int = 16,
    ) -> None:
        super().__init__()
        flat = [f"{name} {tuple(shape)}" for name, shape in shapes.items() if len(shape) != 3]
        if flat:
            raise ValueError(f"An attention head needs maps (C, h, w), but the features are {', '.join(flat)}. Leave pool out.")
        if width % num_heads:
            raise ValueError(f"width={width} is no multiple of num_heads={num_heads}.")
        maps = [(c, min(grid, h), min(grid, w)) for _, (c, h, w) in sorted(shapes.items())]
        self.norms = nn.ModuleList([nn.LayerNorm(shape) for shape in maps])
        self.projections = nn.ModuleList([nn.Conv2d(shape[0], width, 1) for shape in maps])
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            [BasicTransformerBlock(width, num_heads, width // num_heads, activation_fn="gelu") for _ in range(depth)]
        )
        self.fc = nn.Linear(levels * width, num_classes)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K)."""
        config = self.config
        maps = [_levels(features, name, shape, config.levels) for name, shape in sorted(config.shapes.items())]
        classes = [self._class_token([values[i] for values in maps]) for i in range(config.levels)]
        return self.fc(torch.cat(classes, dim=1))

    def _class_token(self, maps: list[Tensor]) -> Tensor:
        tokens = [self.cls.expand(len(maps[0]), -1, -1)]
        for value, norm, project in zip(maps, self.norms, self.projections, strict=True):
            tokens.append(project(norm(shrink(value, self.config.grid).to(self.cls.dtype))).flatten(2).transpose(1, 2))
        h = torch.cat(tokens, dim=1)
        for block in self.blocks:
            h = block(h)
        return h[:, 0]


class FeedbackHead(ModelMixin, ConfigMixin):
    """DifFeed: what the decoder found in a first pass is fed to the encoder of a second one, whose features are classified.

    Args:
        pairs: encoder tap that is fed, by decoder tap; see `genkit.features.taps.mirrors_of`.
        channels: (channels of the decoder tap, channels of the encoder tap), by decoder tap.
        shapes, num_classes, width, num_heads, depth, grid: of the `AttentionHead` on the second pass.

    Example:
        >>> head = FeedbackHead({"block.6": "block.4"}, {"block.6": (128, 128)}, {"block.7": (128, 8, 8)}, 10, width=128)
        >>> head(first, lambda fed: extractor(latents=x0, inject=fed, grad=True))
    """

    @register_to_config
    def __init__(
        self,
        pairs: Mapping[str, str],
        channels: Mapping[str, Sequence[int]],
        shapes: Shapes,
        num_classes: int,
        width: int = 1024,
        num_heads: int = 8,
        depth: int = 2,
        grid: int = 16,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(channels[name][0], channels[name][1], 1, bias=False), nn.BatchNorm2d(channels[name][1]), nn.ReLU()
                )
                for name in sorted(pairs)
            ]
        )
        self.head = AttentionHead(shapes, num_classes, 1, width, num_heads, depth, grid)

    def feedback(self, first: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What to add at each encoder tap (B, C, h, w), of the decoder's features (B, C', h, w) in the first pass."""
        return {
            encoder: conv(first[decoder].to(self.dtype))
            for (decoder, encoder), conv in zip(sorted(self.config.pairs.items()), self.convs, strict=True)
        }

    def forward(self, first: Mapping[str, Tensor], rerun: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Tensor:
        """Logits (B, K).

        Args:
            first: the decoder's features in the first pass.
            rerun: the features of the second pass, given what to add at each encoder tap.
        """
        return self.head(rerun(self.feedback(first)))
