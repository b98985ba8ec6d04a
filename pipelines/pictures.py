"""Pictures given to a pipeline, in any of the usual forms, as tensors of the model's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.data.pictures import fit_picture, to_rgb

Images = Image.Image | np.ndarray | Tensor | Iterable[Any]


def is_single(images: Images) -> bool:
    """Whether this is one picture and no batch."""
    return isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3)


def pictures(images: Images, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """Pictures as tensors `shape` = (C, H, W) in [-1, 1], one by one, as they are needed.

    PIL images and arrays of uint8 are scaled to cover the shape and cut to its centre; what comes as floats must have it.

    Raises:
        ValueError: no picture, of another shape, or with values out of range; names which one.
    """
    if not is_single(images) and not isinstance(images, Iterable):
        raise ValueError(f"{type(images).__name__} is no image. Give PIL images, arrays or tensors.")
    each: Iterable[Any] = [images] if is_single(images) else images  # type: ignore[assignment]
    for i, image in enumerate(each):
        yield _picture(image, shape, i)


def _picture(image: Any, shape: tuple[int, int, int], index: int) -> Tensor:
    channels, height, width = shape
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (3, 4)))
    ):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        picture = to_rgb(image)
        return fit_picture(picture.convert("L") if channels == 1 else picture, (height, width))
    if isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3:
        tensor = torch.from_numpy(image).permute(2, 0, 1).float() * 2 - 1
    elif isinstance(image, Tensor) and image.is_floating_point():
        tensor = image.detach().float()
    else:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, np.ndarray | Tensor) else type(image).__name__
        raise ValueError(f"Image {index} is {what}. Give a PIL image, an array (H, W, 3) or a float tensor (3, H, W) in [-1, 1].")
    if tensor.shape != shape:
        raise ValueError(
            f"Image {index} has shape {tuple(image.shape)}, but the model takes {shape}. Resize it, or give a PIL image."
        )
    if not torch.isfinite(tensor).all() or tensor.abs().max() > 1.5:
        raise ValueError(
            f"Image {index} has values from {tensor.min():g} to {tensor.max():g}. Tensors are in [-1, 1], float arrays in [0, 1]."
        )
    return tensor
