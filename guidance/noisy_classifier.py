"""Classic classifier guidance: a classifier that was trained on noisy samples.

    score(x | y) = score(x) + s grad_x log p(y | x, sigma)

(Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.) The classifier sees what the diffusion model sees (latents, for a latent
model) and the noise level, so its gradient is one of the density at that level, and s = 1 is Bayes' rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit.guidance.classifier import Target, resolve_target
from genkit.guidance.energy import EnergyGuidance
from genkit.guidance.networks import NoisyEncoder, PooledHead, interned, load_network, require_shape
from genkit.guidance.shared import shared
from genkit.levels import Level


class NoisyClassifier(ModelMixin, ConfigMixin):
    """Reads attributes of noisy samples; its `trunk` also serves discriminators as their feature extractor.

    Args:
        labels: the class names of each attribute, for instance `{"digit": ["zero", ...], "ink": [...]}`.
        sample_shape: (C, h, w) of the samples.
        encoder: arguments of `NoisyEncoder`, without `in_channels`.
        trained_on: what the samples were: the record of `genkit.guidance.origin`.

    Example:
        >>> classifier = NoisyClassifier.from_pretrained(genkit.zoo.path("digits-noisy-classifier"))
        >>> classifier(x, level)                 # (B, 10) logits of the first attribute
    """

    @register_to_config
    def __init__(
        self,
        labels: dict[str, list[str]],
        sample_shape: tuple[int, int, int],
        encoder: dict[str, Any],
        trained_on: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = NoisyEncoder(in_channels=sample_shape[0], **encoder)
        groups = encoder.get("norm_num_groups", 32)
        self.heads = nn.ModuleDict(
            {name: PooledHead(self.trunk.out_channels, len(names), norm_num_groups=groups) for name, names in labels.items()}
        )

    def attributes(self, x: Tensor, level: Level) -> dict[str, Tensor]:
        """Logits (B, K) of every attribute, from one pass."""
        h = shared(self.trunk, x, level)
        return {name: head(h) for name, head in self.heads.items()}

    def forward(self, x: Tensor, level: Level, attribute: str | None = None) -> Tensor:
        """Logits (B, K) of one attribute, by default the first, of noisy samples x (B, C, h, w)."""
        name = next(iter(self.config.labels)) if attribute is None else attribute
        return self.heads[name](shared(self.trunk, x, level))


class NoisyClassifierGuidance(EnergyGuidance):
    """Steer to a class with a classifier of noisy samples.

    Args:
        classifier: a `NoisyClassifier`, or any module that maps (x, level) to logits (B, K).
        target: class index or label name, one for all samples or one for each.
        scale: weight of the gradient; 1 is Bayes' rule, ADM uses 1 to 10.
        attribute: which attribute of a `NoisyClassifier`; the first by default.

    Raises:
        ValueError: an unknown class or attribute; at the first step, samples of another shape than the classifier was trained on.

    Example:
        >>> guide = NoisyClassifier.from_pretrained(genkit.zoo.path("digits-noisy-classifier")).eval()
        >>> pipe("", guidance=NoisyClassifierGuidance(guide, "seven"))
    """

    name = "noisy-classifier"

    def __init__(self, classifier: nn.Module, target: Target, scale: float = 1.0, *, attribute: str | None = None) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.target, self.attribute = resolve_target(classifier, target, attribute), attribute
        super().__init__(self._log_probability, scale, "direct", "latent")

    def _log_probability(self, x: Tensor, level: Level) -> Tensor:
        """log p(y | x), (B,)."""
        if len(self.target) not in (1, len(x)):
            raise ValueError(f"There are {len(self.target)} targets for {len(x)} samples. Give one, or one for each.")
        require_shape(x, self.classifier, "noisy classifier")
        logits = self.classifier(x, level) if self.attribute is None else self.classifier(x, level, self.attribute)
        target = self.target.to(logits.device).expand(len(x))
        return -F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), target, reduction="none").to(x.dtype)


def load_noisy_classifier(name: str | Path) -> NoisyClassifier:
    """A noisy classifier: an embedded one by name, or its folder. In eval mode, frozen.

    Raises:
        ValueError: no such model, or the folder is damaged or holds another model.
    """
    classifier = load_network(NoisyClassifier, name, "noisy classifier")
    classifier.trunk = interned(classifier.trunk)
    return classifier
