"""A diffusion model of layouts alone: which objects, how many, how large, and where, before any picture is seen.

A layout of N slots is a sample y (N, K + 5): for each slot the class as a one-hot vector of -1 and 1, the last entry of which
stands for an empty slot, and the box, 4 (x0, y0, x1, y1) - 2, or zeros. The network is a transformer over slots without positions,
so that the order of objects does not count. Its evidence bound

    -log p(y)  <=  1/2 int E || eps - eps_phi(y_t, t) ||^2 d lambda  + const            lambda = ln(alpha^2 / sigma^2)

ends at the noise level where sigma / alpha is `RESOLUTION` of a picture's side: a box is a point of a continuum, whose probability
is that of all boxes which are the same at this resolution. Without an end, empty slots, which are exact, would be infinitely
likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

BOX_SCALE, BOX_SHIFT = 4.0, -2.0  # boxes then have about unit variance
RESOLUTION = 1 / 64  # of a picture's side


class LayoutPrior(ModelMixin, ConfigMixin):
    """Velocity of noisy layouts.

    Args:
        class_names: the vocabulary, in the order of its numbers.
        slots: most objects of a layout.
        width, layers, heads: of the transformer.

    Example:
        >>> prior = LayoutPrior(["cat", "dog"], slots=6)
        >>> prior(torch.randn(8, 6, 7), torch.full((8,), 500)).shape
        torch.Size([8, 6, 7])
    """

    @register_to_config
    def __init__(self, class_names: Sequence[str], slots: int = 6, width: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        channels = len(class_names) + 5
        self.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.proj_in = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(BasicTransformerBlock(width, heads, width // heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        """v (B, N, K + 5) of noisy layouts y (B, N, K + 5) at timesteps t (B,)."""
        hidden = self.proj_in(y) + self.time_embedding(self.time_proj(t).to(y))[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.proj_out(self.norm(hidden))


def prior_scheduler() -> DDIMScheduler:
    """The noise schedule of priors: cosine (Nichol & Dhariwal 2021, arXiv 2102.09672), v-prediction."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )


def to_samples(layouts: Tensor, classes: int) -> Tensor:
    """Samples y (B, N, K + 5) of packed layouts (B, N, 5), see `genkit.layouts.pack`."""
    present = layouts[..., :1] >= 0
    label = torch.where(present[..., 0], layouts[..., 0], float(classes)).long()
    one_hot = 2 * nn.functional.one_hot(label, classes + 1).to(layouts) - 1
    return torch.cat([one_hot, present * (BOX_SCALE * layouts[..., 1:] + BOX_SHIFT)], dim=-1)


def to_layouts(y: Tensor) -> Tensor:
    """Packed layouts (B, N, 5) of samples y (B, N, K + 5): the likeliest class of each slot, and its box where it is one."""
    label = y[..., :-4].argmax(-1, keepdim=True)
    boxes = ((y[..., -4:] - BOX_SHIFT) / BOX_SCALE).clamp(0, 1)
    whole = (label < y.shape[-1] - 5) & (boxes[..., :1] < boxes[..., 2:3]) & (boxes[..., 1:2] < boxes[..., 3:])
    return torch.where(whole, torch.cat([label.to(y), boxes], dim=-1), y.new_tensor([-1.0, 0, 0, 0, 0]))


def prior_span(scheduler: Any) -> float:
    """The fraction of the training time at which the noise is as large as `RESOLUTION`: the lower end of the evidence bound."""
    alphas_cumprod = scheduler.alphas_cumprod
    ratio = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    return float((ratio < BOX_SCALE * RESOLUTION).sum()) / len(ratio)
