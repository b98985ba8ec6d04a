"""The embedded image classifiers: a small residual network with one linear head for each attribute."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from genkit import zoo
from genkit.checkpoints import check_folder


class _Block(nn.Module):
    """Two 3x3 convolutions with group normalisation around a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, groups: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, width)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, width)
        self.act2 = activation()
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.norm2(self.conv2(h)) + self.shortcut(x))


class AttributeClassifier(ModelMixin, ConfigMixin):
    """Classifies images by several attributes at once.

    Args:
        labels: the class names of each attribute, for instance `{"digit": ["zero", ...], "ink": [...]}`.
        block_out_channels: width of each stage; every stage after the first halves the resolution.
        layers_per_block: residual blocks in a stage.
        activation: "relu" or "silu".
        dropout: on the pooled features, in training.
        sample_size: side of the square images it was trained on, in pixels.

    Example:
        >>> classifier = AttributeClassifier.from_pretrained(genkit.zoo.path("digits-classifier"))
        >>> classifier(images)                     # (B, 10) logits of the first attribute, images in [-1, 1]
        >>> classifier(images, attribute="ink")    # (B, 8)
    """

    @register_to_config
    def __init__(
        self,
        labels: dict[str, list[str]],
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 2,
        norm_num_groups: int = 8,
        activation: str = "relu",
        dropout: float = 0.1,
        sample_size: int = 32,
    ) -> None:
        super().__init__()
        act = {"relu": nn.ReLU, "silu": nn.SiLU}[activation]
        width = block_out_channels[0]
        self.conv_in = nn.Conv2d(3, width, 3, 1, 1)
        blocks = []
        for i, width_out in enumerate(block_out_channels):
            for j in range(layers_per_block):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(_Block(width, width_out, stride, norm_num_groups, act))
                width = width_out
        self.blocks = nn.Sequential(*blocks)
        self.drop = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(names)) for name, names in labels.items()})

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, C) of images (B, 3, H, W) in [-1, 1]."""
        return F.adaptive_avg_pool2d(self.blocks(self.conv_in(images)), 1).flatten(1)

    def attributes(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every attribute, from one pass."""
        h = self.drop(self.features(images))
        return {name: head(h) for name, head in self.heads.items()}

    def forward(self, images: Tensor, attribute: str | None = None) -> Tensor:
        """Logits (B, K) of one attribute, by default the first."""
        name = next(iter(self.config.labels)) if attribute is None else attribute
        if name not in self.heads:
            raise ValueError(f"The classifier has no attribute {name!r}. It has: {', '.join(self.heads)}.")
        return self.heads[name](self.drop(self.features(images)))


def load_classifier(name: str) -> nn.Module:
    """A classifier by name, in eval mode with frozen weights.

    Args:
        name: an embedded one ("digits-classifier"), a folder saved by `AttributeClassifier` or by a transformers image classifier,
            "timm:NAME" or "torchvision:NAME" (pretrained; their weights come from the hub or the cache).

    Raises:
        ValueError: unknown name, or a folder that holds no classifier.
    """
    source, colon, model = name.partition(":")
    if colon and source == "timm":
        import timm

        network = timm.create_model(model, pretrained=True)
    elif colon and source == "torchvision":
        import torchvision

        network = torchvision.models.get_model(model, weights="DEFAULT")
    else:
        network = _load_folder(name)
    return network.eval().requires_grad_(False)


def _load_folder(name: str) -> nn.Module:
    folder = Path(name) if Path(name).is_dir() and name not in zoo.names() else zoo.path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no classifier: config.json is missing.")
    check_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.get("_class_name") == AttributeClassifier.__name__:
        return AttributeClassifier.from_pretrained(folder, dtype=torch.float32)
    if "architectures" not in config:
        raise ValueError(f"{folder} holds a {config.get('_class_name', 'model')}, which is no classifier.")
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
