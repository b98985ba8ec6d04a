"""From a layout to what a network's cross-attention reads; one of two codecs.

    gligen   a token an object: MLP([class embedding, Fourier features of the box]), boxes continuous and differentiable
             (Li et al., GLIGEN, 2023, arXiv 2301.07093, eq. 4 to 6)
    tokens   three tokens an object: class, top-left and bottom-right corner on a grid, all rows of one table; positions are added
             and a small transformer reads them (the layout models of Rombach et al. 2022, arXiv 2112.10752, appendix D.2)

Empty slots are learned null features, or the table's last row. A layout whose slots are all empty is the null condition.

Attention has to learn from nothing which places lie in a box. With "gligen" a layout may be painted beside it, too: the network's
further input channels are, at each place p,

    sum_j m_j(p) [W e_j, 1, u_j(p), v_j(p)], k(p)     m_j the box of object j with soft edges, e_j its class embedding,
                                                      u, v coordinates in the box from -1 to 1, k whether all is told at p

which has no order of the objects, and is differentiable in the boxes. k tells apart that nothing is there and that nothing is
known: it is 1 everywhere but in the null condition, and in training.
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
from genkit.layouts.layout import inside

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
        paint: channels of W e; 0 paints nothing.

    Raises:
        ValueError: an unknown codec, a vocabulary smaller than the classes need, or paint without "gligen".
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
        paint: int = 0,
    ) -> None:
        super().__init__()
        if codec not in CODECS:
            raise unknown("codec", codec, CODECS)
        if paint and codec != "gligen":
            raise ValueError(f"paint={paint} needs the codec 'gligen': {codec!r} has no boxes. Use paint=0.")
        self.embedder = (
            GligenCodec(len(class_names), dim, paint)
            if codec == "gligen"
            else TokenCodec(len(class_names), slots, dim, vocabulary, layers)
        )

    def forward(self, layout: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
        """What the network is told: `layout_embeds` (B, L, dim), and with paint `layout_objects` (B, N, paint + 5), `layout_known`.

        Args:
            layout: packed (B, N, 5).
            known: boxes (B, 4) in which the layout is complete; by default the whole picture. Only paint can show it.
        """
        told = self.embedder(layout.to(self.dtype))
        if known is not None and self.config.paint:
            told["layout_known"] = known.to(self.dtype)
        return told

    def null(self, count: int) -> dict[str, Tensor]:
        """The same of `count` layouts of which nothing is known."""
        empty = torch.zeros(1, self.config.slots, 5, device=self.device)
        empty[..., 0] = -1
        told = self(empty, torch.zeros(1, 4, device=self.device))
        return {name: value.expand(count, *value.shape[1:]) for name, value in told.items()}


class GligenCodec(nn.Module):
    """A token an object, from its class embedding and its box."""

    def __init__(self, classes: int, dim: int, paint: int = 0) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, dim)
        self.position_net = GLIGENTextBoundingboxProjection(dim, dim)
        self.paint = nn.Linear(dim, paint, bias=False) if paint else None

    def forward(self, layout: Tensor) -> dict[str, Tensor]:
        present = (layout[..., 0] >= 0).to(layout)
        return self.encode(self.table(layout[..., 0].long().clamp(min=0)), layout[..., 1:], present)

    def encode(self, classes: Tensor, boxes: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Of class embeddings (B, N, dim), boxes (B, N, 4) and which slots hold an object (B, N), 0 to 1."""
        found = {"layout_embeds": self.position_net(boxes, present, positive_embeddings=classes)}
        if self.paint is not None:
            found["layout_objects"] = torch.cat([self.paint(classes), present[..., None], boxes], dim=-1)
            found["layout_known"] = boxes.new_tensor([[0, 0, 1, 1]]).expand(len(boxes), -1)
        return found


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

    def forward(self, layout: Tensor) -> dict[str, Tensor]:
        return self.encode(self.table(self.ids(layout)))

    def ids(self, layout: Tensor) -> Tensor:
        """Rows of the table (B, 3 N): class, top-left, bottom-right of each slot; the last row for an empty one."""
        none = self.table.num_embeddings - 1
        corners = (layout[..., 1:].clamp(0, 1) * (self.side - 1)).round().long()
        first, last = corners[..., 1] * self.side + corners[..., 0], corners[..., 3] * self.side + corners[..., 2]
        ids = torch.stack([layout[..., 0].long(), first, last], dim=-1)
        return torch.where(layout[..., :1] < 0, none, ids).flatten(1)

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of rows of the table (B, 3 N, dim)."""
        hidden = tokens + self.positions.to(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return {"layout_embeds": self.norm(hidden)}


def painted(objects: Tensor, known: Tensor, height: int, width: int) -> Tensor:
    """`layout_objects` (B, N, K + 5) and `layout_known` (B, 4) at the places of latents: (B, K + 4, height, width)."""
    features, present, boxes = objects[..., :-5], objects[..., -5:-4], objects[..., -4:]
    low, high = boxes[..., :2], boxes[..., 2:]
    covered, within = [], []
    for axis, count in enumerate((width, height)):
        at = (torch.arange(count, device=objects.device, dtype=objects.dtype) + 0.5) / count
        first, last = low[..., axis, None], high[..., axis, None]
        # Soft over half a place to each side, so that the boxes have a gradient.
        covered.append(torch.sigmoid(2 * count * (at - first)) * torch.sigmoid(2 * count * (last - at)))
        within.append((2 * at - first - last) / (last - first).clamp(min=1 / count))
    mask = present[..., None] * covered[1][..., :, None] * covered[0][..., None, :]  # (B, N, height, width)
    channels = [torch.einsum("bnk,bnhw->bkhw", features, mask), mask.sum(1, keepdim=True)]
    channels.append((mask * within[0][..., None, :]).sum(1, keepdim=True))
    channels.append((mask * within[1][..., :, None]).sum(1, keepdim=True))
    channels.append(inside(known, height, width)[:, None].to(objects))
    return torch.cat(channels, dim=1)
