"""The discriminator of adversarial distillation: frozen features, and a trained head on each.

    D_k(x0, c) = head_k(F_k(x0), c),        F_k: `genkit.distill.sources`, c: prompt, noise level and picture, side by side

Features and scores are two calls, since a round may score the same features twice: detached, to train the heads, and then with the
new heads and with their graph, to train the student.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from genkit.denoisers import Cond
from genkit.distill.heads import HEADS
from genkit.distill.sources import FeatureSource
from genkit.errors import unknown

TIME_DIM = 64  # sines and cosines of the noise level


class FeatureDiscriminator(nn.Module):
    """Heads on the features of a frozen network. The heads are all that it trains, and all that its state_dict holds.

    Args:
        source: of the features.
        cond_dim: D of the condition's vectors, see `genkit.distill.networks.condition_vector`; 0 leaves the prompt out.
        head: "conv2d", "mlp" or "stylegan-t", see `genkit.distill.heads`.
        image_dim: D of the vectors of the real pictures that the student started from, `PixelEncoder.embed`; 0 has none.
        time: whether heads know the noise level; by default where features are those of noised samples.
        width, spectral: of the heads; the StyleGAN-T head has its own.
        depth: of `ConvHead`.

    Raises:
        ValueError: an unknown head.

    Example:
        >>> discriminator = FeatureDiscriminator(TeacherTaps(pipe.denoiser), cond_dim=vector.shape[1])
        >>> features = discriminator.extract(x0, cond, u, eps)
        >>> logits = discriminator.score(features, vector, u)           # a (B, N_k) for each head
    """

    def __init__(
        self,
        source: FeatureSource,
        cond_dim: int,
        *,
        head: str = "conv2d",
        image_dim: int = 0,
        time: bool | None = None,
        width: int = 256,
        depth: int = 1,
        spectral: bool = True,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise unknown("head", head, HEADS)
        self.source, self.cond_dim, self.image_dim = source, cond_dim, image_dim
        self.time = source.noisy if time is None else time
        total = cond_dim + image_dim + TIME_DIM * self.time
        options: dict[str, dict[str, Any]] = {
            "conv2d": {"width": width, "depth": depth, "spectral": spectral},
            "mlp": {"width": width, "spectral": spectral},
            "stylegan-t": {},
        }
        self.heads = nn.ModuleList(HEADS[head](channels, total, **options[head]) for channels in source.channels)

    def extract(self, x0: Tensor, cond: Cond | None, u: Tensor, eps: Tensor, perturbation: Tensor | float = 0.0) -> list[Tensor]:
        """Features (B, C, h, w) of each tap; see `FeatureSource`. Gradients flow to x0 where they are on."""
        return self.source(x0, cond, u, eps, perturbation)

    def score(self, features: list[Tensor], vector: Tensor, u: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """Logits (B, N_k) of each head, float32 also under autocast.

        Args:
            features: of `extract`.
            vector: (B, cond_dim), the prompt.
            u: (B,) noise levels of the features.
            image: (B, image_dim). Of a student that started at pure noise there is no such picture: give zeros.

        Raises:
            ValueError: features of another number of taps, or a condition that is missing or of another size.
        """
        if len(features) != len(self.heads):
            raise ValueError(f"There are {len(features)} features for {len(self.heads)} heads. Extract them from the source.")
        return [self.judge(k, value, vector, u, image) for k, value in enumerate(features)]

    def judge(self, k: int, feature: Tensor, vector: Tensor, u: Tensor | None = None, image: Tensor | None = None) -> Tensor:
        """Logits (B, N_k) of head k for its feature (B, C, h, w); otherwise as `score`."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.heads[k](feature.float(), self._condition(feature, vector, u, image))

    def forward(self, features: list[Tensor], vector: Tensor, u: Tensor | None = None, image: Tensor | None = None) -> list[Tensor]:
        """`score`."""
        return self.score(features, vector, u, image)

    def _condition(self, like: Tensor, vector: Tensor, u: Tensor | None, image: Tensor | None) -> Tensor:
        """What the heads are conditioned on, (B, D): vectors normalised, since encoders differ in scale by orders of magnitude."""
        parts = []
        for name, value, dim in (("vector", vector, self.cond_dim), ("image", image, self.image_dim)):
            if not dim:
                continue
            if value is None or value.shape != (len(like), dim):
                raise ValueError(f"{name} is {None if value is None else tuple(value.shape)}, but {(len(like), dim)} is needed.")
            parts.append(F.layer_norm(value.to(like), (dim,)))
        if self.time:
            if u is None or len(u) != len(like):
                raise ValueError(f"The heads know the noise level: give u ({len(like)},), the levels of the features.")
            parts.append(get_timestep_embedding(1000 * u.to(like), TIME_DIM, flip_sin_to_cos=True, downscale_freq_shift=0))
        return torch.cat(parts, 1) if parts else like.new_zeros(len(like), 0)
