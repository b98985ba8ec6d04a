"""CLIP guidance: steer towards a text with an image-text model (Radford et al. 2021, arXiv 2103.00020).

    U(x) = s cos(f_image(x), f_text)          s = exp(logit_scale), about 100

so U is the model's own logit of the text. With `cutouts`, f_image(x) is compared on random square crops and U is the mean, which
keeps a sharp optimum of a single view from being found (the augmentation of CLIP-guided diffusion, Crowson 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit import noise
from genkit.attention.proof import check
from genkit.guidance.energy import EnergyGuidance
from genkit.guidance.shared import shared
from genkit.levels import Level

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALLEST_CUTOUT = 0.5  # of the shorter side
_STREAM = 1  # of the seeds' guidance noise


class ClipEnergy:
    """The log-potential of texts as a function of images (B, 3, H, W) in [-1, 1].

    Args:
        text: one text for all samples, or one for each.
        model: a model of the Hub, a folder in transformers' layout (CLIP, SigLIP and what else has image and text features),
            "open_clip:ARCHITECTURE:TAG" (extra `clip`), or a network that is already loaded.
        tokenizer: of a network that is already loaded: called with a list of texts; by default that of its `name_or_path`.
        cutouts: random crops of each image, half its shorter side to all of it; 0 compares the whole image.

    The network runs in eval mode with frozen weights; the text's features are computed once. Images are resized (bicubic with
    antialiasing) and normalised as the model wants them, and stay differentiable.

    Raises:
        ValueError: no text, negative `cutouts`, or a model that has no image and text features.
        ImportError: open_clip is wanted and not installed.
    """

    def __init__(
        self, text: str | Sequence[str], model: str | Path | nn.Module = DEFAULT_MODEL, *, tokenizer: Any = None, cutouts: int = 0
    ) -> None:
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"text={text!r:.100} must be a text, or one for each sample.")
        if not isinstance(cutouts, int) or cutouts < 0:
            raise ValueError(f"cutouts={cutouts!r} must be a whole number of at least 0.")
        self.cutouts = cutouts
        self.network, tokenizer, (self.size, self.mean, self.std) = _load(model, tokenizer)
        check(self.network)
        with torch.no_grad():
            self.text_features = _text_features(self.network, tokenizer, texts)

    def __call__(self, images: Tensor, level: Level | None = None, *, seeds: Sequence[int] | None = None) -> Tensor:
        """exp(logit_scale) * cosine similarity (B,).

        Args:
            level, seeds: each sample's seed and the evaluation decide where the cutouts are; without seeds torch's global generator
                does.
        """
        scale = self.network.logit_scale.detach().exp().to(images).reshape(())
        views = _cutouts(images, self.cutouts, self.size, 0 if level is None else level.index, seeds) if self.cutouts else images
        return scale * self._cosine(views, len(images))

    def similarity(self, images: Tensor) -> Tensor:
        """Cosine similarity (B,) of texts and whole images (B, 3, H, W) in [-1, 1], -1 to 1."""
        return self._cosine(images, len(images))

    def _cosine(self, views: Tensor, count: int) -> Tensor:
        """Mean similarity (B,) over the views (B * n, 3, H, W) of each of B = `count` images."""
        if len(self.text_features) not in (1, count):
            raise ValueError(f"There are {len(self.text_features)} texts for {count} samples. Give one, or one for each.")
        features = shared(_image_features, self.network, views, self.size, self.mean, self.std)
        text = self.text_features.to(features).unsqueeze(1)
        return (features.unflatten(0, (count, -1)) * text).sum(-1).mean(1)


class ClipGuidance(EnergyGuidance):
    """Steer towards a text with CLIP or a model like it, on any diffusion model.

    Args:
        text, model, tokenizer, cutouts: see `ClipEnergy`.
        scale: weight of the gradient; 1 takes the model's logit as a log-likelihood. CLIP saw no noisy images: expect to need more
            with a blurry predicted image, and less with cutouts.
        route: "x0_detached" (default) or "through_denoiser".

    Example:
        >>> pipe("a house", guidance=ClipGuidance("a house in the snow", cutouts=8, scale=2.0))
    """

    name = "clip"
    energy: ClipEnergy

    def __init__(
        self,
        text: str | Sequence[str],
        model: str | Path | nn.Module = DEFAULT_MODEL,
        scale: float = 1.0,
        *,
        route: str = "x0_detached",
        sigma_data: float | None = None,
        **energy: Any,
    ) -> None:
        super().__init__(ClipEnergy(text, model, **energy), scale, route, "image", sigma_data=sigma_data)


Settings = tuple[int, tuple[float, ...], tuple[float, ...]]  # side in pixels, mean, std


def _load(model: str | Path | nn.Module, tokenizer: Any) -> tuple[Any, Any, Settings]:
    """(network, tokenizer, settings), the network frozen and in eval mode."""
    if isinstance(model, str) and model.startswith("open_clip:"):
        return _load_open_clip(model)
    from transformers import AutoModel, AutoTokenizer

    if isinstance(model, nn.Module):
        network, source = model, getattr(model, "name_or_path", "")
        if tokenizer is None and not source:
            raise ValueError(f"The {type(model).__name__} does not say where its tokenizer is. Give tokenizer=...")
    else:
        source = str(model)
        network = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    if not all(hasattr(network, name) for name in ("get_image_features", "get_text_features", "logit_scale")):
        raise ValueError(f"{type(network).__name__} is no image-text model. Give CLIP, SigLIP or one like them.")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    return network.eval().requires_grad_(False), tokenizer, _settings(network, source)


def _settings(network: Any, source: str) -> Settings:
    """What the model's image processor says, or else the defaults of its family."""
    from transformers import CLIPImageProcessor

    try:
        config, _ = CLIPImageProcessor.get_image_processor_dict(source) if source else ({}, {})
    except OSError:
        config = {}
    siglip = "siglip" in network.config.model_type
    mean = config.get("image_mean") or ((0.5,) * 3 if siglip else CLIP_MEAN)
    std = config.get("image_std") or ((0.5,) * 3 if siglip else CLIP_STD)
    return network.config.vision_config.image_size, tuple(mean), tuple(std)


def _load_open_clip(model: str) -> tuple[Any, Any, Settings]:
    _, architecture, tag = [*model.split(":"), "", ""][:3]
    if not architecture or not tag:
        raise ValueError(f"model={model!r} is not open_clip:ARCHITECTURE:TAG, for instance open_clip:ViT-B-32:laion2b_s34b_b79k.")
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"model={model!r} needs open_clip: pip install 'genkit-diffusion[clip]'.") from error
    network = open_clip.create_model(architecture, pretrained=tag).eval().requires_grad_(False)
    size = network.visual.image_size
    config = network.visual.preprocess_cfg
    settings = (size if isinstance(size, int) else size[0], tuple(config["mean"]), tuple(config["std"]))
    return network, open_clip.get_tokenizer(architecture), settings


def _text_features(network: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Normalised features (n, D)."""
    device = next(network.parameters()).device
    if hasattr(network, "encode_text"):
        features = network.encode_text(tokenizer(texts).to(device))
    else:
        # SigLIP was trained on texts padded to the full length; CLIP does not care.
        length = network.config.text_config.max_position_embeddings
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(device)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        features = _tensor(network.get_text_features(**inputs))
    return F.normalize(features.float(), dim=-1)


def _image_features(network: Any, images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised features (n, D) of images (n, 3, H, W) in [-1, 1]."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    center, spread = (images.new_tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    pixels = ((images / 2 + 0.5 - center) / spread).to(next(network.parameters()).dtype)
    features = network.encode_image(pixels) if hasattr(network, "encode_image") else _tensor(network.get_image_features(pixels))
    return F.normalize(features.to(images.dtype), dim=-1)


def _tensor(features: Any) -> Tensor:
    """transformers 5 returns the tower's output with the features as `pooler_output`, version 4 the features."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _cutouts(images: Tensor, count: int, size: int, index: int, seeds: Sequence[int] | None) -> Tensor:
    """`count` random square crops of each image (B, 3, H, W), resized: (B * count, 3, size, size)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    if seeds is None:
        numbers = torch.rand(len(images), count, 3)
    else:
        keys = [noise.mix(noise.mix(seed, noise.GUIDANCE), _STREAM) for seed in seeds]
        numbers = torch.stack([torch.rand(count, 3, generator=g) for g in noise.generators(keys, index)])
    crops = []
    for image, rows in zip(images, numbers.tolist(), strict=True):
        for share, down, across in rows:
            edge = max(1, round(side * (SMALLEST_CUTOUT + (1 - SMALLEST_CUTOUT) * share)))
            y, x = int(down * (height - edge + 1)), int(across * (width - edge + 1))
            crop = image[None, :, y : y + edge, x : x + edge]
            crops.append(F.interpolate(crop, (size, size), mode="bicubic", antialias=True))
    return torch.cat(crops)
