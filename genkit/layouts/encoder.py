"""From a layout to what a network's cross-attention reads; one of two codecs.

    gligen   a token an object: MLP([class embedding, Fourier features of the box]), boxes continuous and differentiable
             (Li et al., GLIGEN, 2023, arXiv 2301.07093, eq. 4 to 6)
    tokens   three tokens an object: class, top-left and bottom-right corner on a grid, all rows of one table; positions are added
             and a small transformer reads them (the layout models of Rombach et al. 2022, arXiv 2112.10752, appendix D.2)

Empty slots are learned null features, or the table's last row. A layout whose slots are all empty is the null condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.errors import unknown

CODECS = ("gligen", "tokens")


class LayoutEncoder(ModelMixin, ConfigMixin):
    """Layouts (B, slots, 5), see `genkit.layouts.pack`, to tokens (B, L, dim).

    Args:
        class_names: the classes, in the order of their numbers.
        slots: most objects of a layout.
        dim: width of the tokens, the `cross_attention_dim` of the network.
        codec: "gligen" or "tokens".
        vocabulary: rows of the table of "tokens"; the grid has floor(sqrt(vocabulary - 1)) points a side.
        layers: transformer blocks of "tokens".

    Raises:
        ValueError: an unknown codec, or a vocabulary smaller than the classes need.
    """

    @register_to_config
    def __init__(
        self,
        class_names: Sequence[str],
        slots: int = 6,
        dim: int = 128,
        codec: str = "gligen",
        vocabulary: int = 1024,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if codec not in CODECS:
            raise unknown("codec", codec, CODECS)
        self.embedder = (
            GligenCodec(len(class_names), dim)
            if codec == "gligen"
            else TokenCodec(len(class_names), slots, dim, vocabulary, layers)
        )

    def forward(self, layout: Tensor) -> Tensor:
        return self.embedder(layout.to(self.dtype))

    def null(self, count: int) -> Tensor:
        """Tokens (count, L, dim) of empty layouts."""
        empty = torch.zeros(1, self.config.slots, 5, device=self.device)
        empty[..., 0] = -1
        return self(empty).expand(count, -1, -1)


class GligenCodec(nn.Module):
    """A token an object, from its class embedding and its box."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, dim)
        self.position_net = GLIGENTextBoundingboxProjection(dim, dim)

    def forward(self, layout: Tensor) -> Tensor:
        present = (layout[..., 0] >= 0).to(layout)
        return self.encode(self.table(layout[..., 0].long().clamp(min=0)), layout[..., 1:], present)

    def encode(self, classes: Tensor, boxes: Tensor, present: Tensor) -> Tensor:
        """Tokens (B, N, dim) of class embeddings (B, N, dim), boxes (B, N, 4) and which slots hold an object (B, N), 0 to 1."""
        return self.position_net(boxes, present, positive_embeddings=classes)


class TokenCodec(nn.Module):
    """Three tokens an object: its class and two corners, all from one table."""

    def __init__(self, classes: int, slots: int, dim: int, vocabulary: int, layers: int) -> None:
        super().__init__()
        self.side = math.isqrt(vocabulary - 1)
        if classes >= vocabulary or self.side < 2:
            raise ValueError(f"vocabulary={vocabulary} is too small for {classes} classes and a grid. Use more.")
        self.table = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(3 * slots, dim))
        self.blocks = nn.ModuleList(BasicTransformerBlock(dim, 4, dim // 4) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, layout: Tensor) -> Tensor:
        return self.encode(self.table(self.ids(layout)))

    def ids(self, layout: Tensor) -> Tensor:
        """Rows of the table (B, 3 N): class, top-left, bottom-right of each slot; the last row for an empty one."""
        none = self.table.num_embeddings - 1
        corners = (layout[..., 1:].clamp(0, 1) * (self.side - 1)).round().long()
        first, last = corners[..., 1] * self.side + corners[..., 0], corners[..., 3] * self.side + corners[..., 2]
        ids = torch.stack([layout[..., 0].long(), first, last], dim=-1)
        return torch.where(layout[..., :1] < 0, none, ids).flatten(1)

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 3 N, dim) as the network reads them, of rows of the table (B, 3 N, dim)."""
        hidden = tokens + self.positions.to(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)
