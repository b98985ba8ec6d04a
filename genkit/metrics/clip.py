"""CLIP score: how well pictures agree with their texts (Hessel et al. 2021, arXiv 2104.08718).

    score = 100 max(cos(f_image(x), f_text), 0)

on the scale of torchmetrics; the paper has 2.5 in place of 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def load_clip(folder: str, device: str = "cpu") -> tuple[nn.Module, Any]:
    """An image-text model of transformers and its tokenizer, from a folder; nothing is downloaded.

    Raises:
        ValueError: no folder, or one without such a model.
    """
    from pathlib import Path

    from genkit.checkpoints import check_folder

    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {folder!r}. Give a CLIP model in transformers' layout, with its tokenizer.")
    check_folder(Path(folder), shapes=False)
    try:
        from transformers import AutoModel, AutoTokenizer

        network = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder!r} holds no image-text model with its tokenizer ({reason}).") from error
    if not hasattr(network, "get_text_features"):
        raise ValueError(f"{folder!r} holds a {type(network).__name__}, which is no image-text model. Give CLIP or SigLIP.")
    return network.eval().requires_grad_(False).to(device), tokenizer


def clip_score(images: Tensor, texts: Sequence[str], model: nn.Module, tokenizer: Any) -> Tensor:
    """Scores (B,) of images (B, 3, H, W) in [-1, 1] and a text for each.

    Args:
        model, tokenizer: see `load_clip`.

    Raises:
        ValueError: an empty text, or not one for each image.

    Example:
        >>> clip_score(images, ["a red seven"] * len(images), *load_clip("clip-vit-base-patch32")).mean()
    """
    from genkit.guidance.clip import ClipEnergy

    if len(texts) != len(images):
        raise ValueError(f"There are {len(texts)} texts for {len(images)} images. Give one for each.")
    device = next(model.parameters()).device
    with torch.no_grad():
        return 100 * ClipEnergy(list(texts), model, tokenizer=tokenizer).similarity(images.to(device)).clamp_min(0).float().cpu()
