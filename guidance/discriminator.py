"""Discriminator guidance (Kim et al., ICML 2023, arXiv 2211.17091).

    score(x) <- score(x) + w grad_x L(x, sigma),        L = log d / (1 - d) = log p_data(x) / p_model(x)

d is a discriminator of noisy samples, trained to tell diffused real data from diffused samples of the very model and sampler
that it will correct; with the optimal one and w = 1 the guided score is the data's. L is its raw logit: the sigmoid of the
reference code, clipped at 1e-5, has no gradient where it saturates, so the worst samples would not be guided (preset `paper`
keeps it).

A conditional model errs in another way, too: its samples miss their condition c. Too few do for a discriminator to learn from them
what goes with what, but real samples teach it (m below), and one network on one trunk gives both:

    U = L + kappa m,        m = log p_data(x | c, sigma) / p_data(x | sigma)

kappa = `matching` acts as classifier-free guidance of scale 1 + kappa does, without a second evaluation of the denoiser. 0 is the
paper's.

A second-order solver evaluates the network twice a step. Either each stage is guided with its own weight, `weights` = (w1, w2),
or the second reuses the first's shift in units of eps, c2 = (sigma1 / sigma2) c1, which costs one evaluation and errs less than
the paper's (2, 0): on Gaussian data, 18 Heun steps, mean and std are 0.971 and 0.558 where (1, 1) has 0.993 and 0.528, and (2, 0)
0.906 and 0.588.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.guidance.base import State
from genkit.guidance.energy import EnergyGuidance
from genkit.guidance.networks import (
    NoisyEncoder,
    PooledHead,
    condition_embedding,
    coordinates,
    embed_condition,
    interned,
    load_network,
    require_shape,
)
from genkit.guidance.origin import require_same
from genkit.guidance.shared import shared
from genkit.levels import Level
from genkit.prediction import Prediction

# The paper's window, tau in [0.01, 1] of its linear schedule, as noise-to-signal ratios.
WINDOW = (0.0446877, 152.167)
MATCHING = 0.5
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"weights": (2.0, 0.0), "reuse": False, "clip": 1e-5, "matching": 0.0},
}


class Discriminator(ModelMixin, ConfigMixin):
    """Tells noisy real samples from noisy generated ones: a frozen feature extractor, then a shallow trained head.

    Args:
        sample_shape: (C, h, w) of the samples.
        head_config: arguments of the `NoisyEncoder` on the features; it also sees the condition.
        extractor_config: those of the one that extracts features, without `in_channels`; None feeds the samples to the head.
        condition: which tensor of the model's condition the head sees, and its size: {"name": "prompt_embeds", "channels": D}
            (text) or {"name": "class_labels", "num_classes": K} (classes); None for an unconditional discriminator.
        classes: how many classes each attribute has that the extractor's own heads read; with a condition, the discriminator then
            also knows what goes with what (see `Match`).
        trained_on: what it was trained on, the record of `genkit.guidance.origin`.

    Its sizes of the paper are `Discriminator(**ADM["pixels 32"])`, with ADM-sized extractors.

    Example:
        >>> discriminator = load_discriminator("digits-discriminator")
        >>> discriminator(x, level, cond)       # (B,) log-ratios
    """

    @register_to_config
    def __init__(
        self,
        sample_shape: tuple[int, int, int],
        head_config: dict[str, Any],
        extractor_config: dict[str, Any] | None = None,
        condition: dict[str, Any] | None = None,
        classes: list[int] | None = None,
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.extractor = (
            None if extractor_config is None else NoisyEncoder(sample_shape[0], **extractor_config).requires_grad_(False)
        )
        channels = sample_shape[0] if self.extractor is None else self.extractor.out_channels
        sizes = None if condition is None else {key: value for key, value in condition.items() if key != "name"}
        self.head = NoisyEncoder(channels, condition=sizes, **head_config)
        self.pool = PooledHead(self.head.out_channels, 1, norm_num_groups=head_config.get("norm_num_groups", 32))
        self.match = None
        if sizes is not None and extractor_config is not None and classes:
            self.match = Match(channels, classes, sizes, extractor_config.get("norm_num_groups", 32))

    def forward(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        """Log-ratio (B,) of noisy samples x (B, C, h, w) in any scheduler's variable; `cond` as the model's denoiser makes it.

        Raises:
            ValueError: samples of another shape, or a condition that lacks what this discriminator needs.
        """
        require_shape(x, self, "discriminator")
        h, condition = self._features(x, level), self._condition(cond)
        if self.extractor is None:
            return self.pool(self.head(x, level, condition))[:, 0]
        _, ratio = coordinates(x, level)
        return self.pool(self.head.encode(h, self.head.level(ratio, condition)))[:, 0]

    def matching(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        """m (B,), how well x goes with its condition: log p_data(x | c) / p_data(x).

        Raises:
            ValueError: the discriminator is unconditional, or its extractor reads nothing.
        """
        return self.matching_pairs(x, level, cond).diagonal()

    def matching_pairs(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        """m (B, B) of every sample with every condition of the batch."""
        if self.match is None:
            raise ValueError("This discriminator knows nothing of conditions. Train a conditional one on a noisy classifier.")
        return self.match(self._features(x, level), self._condition(cond))

    def _features(self, x: Tensor, level: Level) -> Tensor:
        return x if self.extractor is None else shared(self.extractor, x, level)

    def _condition(self, cond: Any) -> Tensor | None:
        wanted = self.config.condition
        if wanted is None:
            return None
        tensors = {} if cond is None else cond.tensors
        if wanted["name"] not in tensors:
            found = ", ".join(tensors) or "nothing"
            raise ValueError(f"The discriminator is conditional on {wanted['name']!r}, but the condition of this run has {found}.")
        value = tensors[wanted["name"]]
        if "channels" in wanted and value.shape[-1] != wanted["channels"]:
            raise ValueError(
                f"The discriminator takes {wanted['name']} of width {wanted['channels']}, but here they have {value.shape[-1]}."
            )
        return value


class Match(nn.Module):
    """How well features (B, C, h, w) go with conditions, (B, B'): what a noisy classifier reads, weighed by the condition.

    m = sum_ik w_ik(c) log p_i(k | x) + bias over the classes k of each attribute i. If the condition says which class k_i each
    attribute has, w_ik = [k = k_i] makes m the log-likelihood of the condition, so w(c) is all there is to learn (a projection
    discriminator: Miyato & Koyama 2018, arXiv 1802.05637).

    Args:
        channels: of the features.
        classes: how many classes each attribute has.
        condition: as `NoiseLevelEmbedding` has it.
        norm_num_groups: of the classifier's heads.
    """

    def __init__(self, channels: int, classes: list[int], condition: dict[str, int], norm_num_groups: int) -> None:
        super().__init__()
        heads = [PooledHead(channels, count, norm_num_groups=norm_num_groups) for count in classes]
        self.heads = nn.ModuleList(heads).requires_grad_(False)
        self.weights = condition_embedding(condition, sum(classes))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        read = torch.cat([head(h).log_softmax(1) for head in self.heads], dim=1)
        return read @ embed_condition(self.weights, condition).T + self.bias


def matching_loss(pairs: Tensor) -> Tensor:
    """The loss that makes m (B, B), of samples with conditions of the same rows, log p(x | c) / p(x).

    Cross-entropy over the rows and over the columns (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748; it finds the
    conditions that nearly fit) leaves one constant open, which binary cross-entropy fixes (Zhai et al. 2023, arXiv 2303.15343).
    """
    target = torch.arange(len(pairs), device=pairs.device)
    others = pairs[~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)]
    contrast = (F.cross_entropy(pairs, target) + F.cross_entropy(pairs.T, target)) / 2
    return contrast + pairwise_bce(pairs.diagonal(), others)


# The networks of the paper's experiments and their sizes (spec of the released code): extractor, head.
_HEAD = {"block_out_channels": (128,), "layers_per_block": 2}
ADM: dict[str, dict[str, Any]] = {
    "pixels 32": {
        "sample_shape": (3, 32, 32),
        "extractor_config": {"block_out_channels": (128, 256, 512), "layers_per_block": 4},
        "head_config": _HEAD,
    },
    "pixels 64": {
        "sample_shape": (3, 64, 64),
        "extractor_config": {
            "block_out_channels": (128, 256, 384, 512), "layers_per_block": 4, "attention": (False, True, True, True),
        },
        "head_config": _HEAD,
    },
    "latents 32": {
        "sample_shape": (4, 32, 32),
        "extractor_config": {"block_out_channels": (128, 256, 384), "layers_per_block": 2},
        "head_config": _HEAD,
        "condition": {"name": "class_labels", "num_classes": 1000},
    },
}  # fmt: skip


def load_discriminator(name: str | Path) -> Discriminator:
    """A discriminator: an embedded one by name, or a folder that `genkit train discriminator` wrote. In eval mode, frozen.

    Raises:
        ValueError: no such model, or the folder is damaged or holds another model.
    """
    discriminator = load_network(Discriminator, name, "discriminator")
    if discriminator.extractor is not None:
        discriminator.extractor = interned(discriminator.extractor)
    return discriminator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boosting:
    """Extra guidance for samples that the discriminator takes for generated (log-ratio below 0); the paper's, for CIFAR-10.

    Args:
        period: on every step that it divides the weight of those samples is multiplied by `weight`.
        weight: 2 in the paper.

    Raises:
        ValueError: a period below 1.
    """

    period: int = 2
    weight: float = 2.0

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"The boosting period {self.period} must be at least 1.")


class DiscriminatorGuidance(EnergyGuidance):
    """Correct a model's score with a discriminator of its own samples (see the top of this file).

    Args:
        discriminator: a `Discriminator`, or any module that maps (x, level, cond) to log-ratios (B,).
        scale: w, 1 in theory.
        weights: (w1, w2) on top of `scale`, for the first and the second stage of a second-order solver.
        reuse: the second stage takes the first's shift in units of eps, times w2 / w1, instead of an evaluation of its own.
        window: noise-to-signal ratios between which it acts; each sample by its own. The paper's by default.
        clip: clip the sigmoid at this distance from 0 and 1, as the reference code does; None uses the raw logit.
        matching: kappa, how strongly a sample is held to its condition; 0 for a discriminator that knows no conditions, else
            0.5 by default.
        boosting: extra weight where the log-ratio is below 0.

    Raises:
        ValueError: weights, window or clip out of range; in a pipeline, another model than the discriminator was trained on.

    Example:
        >>> guide = DiscriminatorGuidance(load_discriminator("digits-discriminator"))
        >>> pipe(captions, guidance=guide, guidance_scale=1.0)
    """

    name = "discriminator"

    def __init__(
        self,
        discriminator: Any,
        scale: float = 1.0,
        *,
        weights: tuple[float, float] = (1.0, 1.0),
        reuse: bool = True,
        window: tuple[float, float] = WINDOW,
        clip: float | None = None,
        matching: float | None = None,
        boosting: Boosting | None = None,
    ) -> None:
        if len(weights) != 2 or not all(math.isfinite(w) for w in weights):
            raise ValueError(f"weights={weights!r} must be two finite numbers, for the first and the second stage.")
        if reuse and weights[0] == 0 and weights[1] != 0:
            raise ValueError(f"weights={weights!r} leave nothing to reuse in the second stage. Set reuse=False.")
        if not 0 <= window[0] <= window[1]:
            raise ValueError(f"window={window!r} is no interval of noise-to-signal ratios.")
        if clip is not None and not 0 < clip < 0.5:
            raise ValueError(f"clip={clip} is not between 0 and 0.5.")
        knows = getattr(discriminator, "match", None) is not None
        self.matching = (MATCHING if knows else 0.0) if matching is None else float(matching)
        if not math.isfinite(self.matching) or (self.matching and not knows):
            raise ValueError(f"matching={matching} must be finite, and 0 for a discriminator that knows no conditions.")
        self.discriminator, self.weights, self.reuse = discriminator.eval().requires_grad_(False), weights, reuse
        self.window, self.clip, self.boosting = window, clip, boosting
        super().__init__(discriminator, scale, "direct", "latent")

    @classmethod
    def from_preset(cls, preset: str, discriminator: Any, **arguments: Any) -> DiscriminatorGuidance:
        """`default`: raw logit, one evaluation a step, weights 1 and 1. `paper`: weights 2 and 0, clipped sigmoid.

        Raises:
            ValueError: unknown preset.
        """
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}. Use one of: {', '.join(PRESETS)}.")
        return cls(discriminator, **{**PRESETS[preset], **arguments})

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        require_same(getattr(getattr(self.discriminator, "config", None), "trained_on", None), pipe, "discriminator")

    def weight(self, state: State) -> float | Tensor:
        level = state.level
        weight = self.weights[level.order - 1]
        ratio = level.sigma / level.alpha if isinstance(level.alpha, Tensor) or level.alpha > 0 else math.inf
        low, high = self.window
        if isinstance(ratio, Tensor):
            return weight * ((ratio >= low) & (ratio <= high))
        return weight if low <= ratio <= high else 0.0

    def active(self, state: State) -> bool:
        reused = self.reuse and state.level.order == 2
        return self._kept(state) is not None and self.weights[1] != 0 if reused else super().active(state)

    def joint(self, state: State) -> Any:
        # What is reused must be this guidance's own shift, so it is evaluated alone where there is a second stage.
        return None if self.reuse and any(level.order == 2 for level in state.levels) else self.route

    def shift(self, state: State, prediction: Prediction) -> Tensor | None:
        level = state.level
        kept = self._kept(state)
        if self.reuse and level.order == 2 and kept is not None:
            return self.weights[1] / self.weights[0] * kept / level.sigma
        c = super().shift(state, prediction)
        if c is not None:
            state.cache[id(self)] = (level.index, level.sigma * c)
        return c

    def _kept(self, state: State) -> Tensor | None:
        """The first stage's shift of eps, if this is the second stage of the same step."""
        index, kept = state.cache.get(id(self), (None, None))
        return kept if index == state.level.index - 1 else None

    def _call(self, z: Tensor, state: State) -> Tensor:
        ratio = self.discriminator(z, state.level, state.cond)
        if self.clip is not None:
            d = torch.sigmoid(ratio).clamp(self.clip, 1 - self.clip)
            ratio = (d / (1 - d)).log()
        if self.boosting is not None and state.level.index % self.boosting.period == 0:
            # The value is reported as it is; only its gradient is multiplied.
            extra = torch.where(ratio.detach() < 0, self.boosting.weight - 1, 0.0)
            ratio = ratio + extra * (ratio - ratio.detach())
        if self.matching:
            ratio = ratio + self.matching * self.discriminator.matching(z, state.level, state.cond)
        return ratio


def bce(discriminator: Any, real: Tensor, fake: Tensor, level: Level, cond: tuple[Any, Any] = (None, None)) -> Tensor:
    """Binary cross-entropy, averaged over both halves, of noisy real and generated samples (B, ...) at the same levels."""
    return pairwise_bce(discriminator(real, level, cond[0]), discriminator(fake, level, cond[1]))


def pairwise_bce(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy of logits (B,) whose truth is 1 and of logits (B,) whose truth is 0."""
    return (F.softplus(-positive).mean() + F.softplus(negative).mean()) / 2
