"""Pictures in NumPy's .npz, as evaluations exchange them: uint8 (N, H, W, 3) named `arr_0`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.data.npy import read_header, texts_of
from genkit.data.pictures import fit_picture
from genkit.data.source import ImageSource

NAMES = ("arr_0", "images")
LIMIT = 2**35  # bytes of an array
_BROKEN = (OSError, ValueError, EOFError, KeyError, SyntaxError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def open_arrays(file: Path, count: int | None = None) -> ImageSource:
    """The pictures of an .npz, see `genkit.data.source.open_source`.

    Raises:
        ValueError: no .npz, no array of pictures, one that is too large, or captions or labels that are not one for each.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            shapes = {name.removesuffix(".npy"): _shape(archive, name) for name in archive.namelist() if name.endswith(".npy")}
        with np.load(file, allow_pickle=False) as content:
            pictures = content[_chosen(file, shapes)]
            captions = texts_of(content["captions"]) if "captions" in shapes else None
            labels = _labels(content["labels"]) if "labels" in shapes else None
    except _BROKEN as error:
        if str(error).startswith(repr(str(file))):
            raise
        raise ValueError(f"{str(file)!r} cannot be read as .npz ({str(error) or type(error).__name__}).") from error
    array = _as_bytes(file, pictures)
    for name, values in (("captions", captions), ("labels", labels)):
        if values is not None and len(values) != len(array):
            raise ValueError(f"{str(file)!r} has {len(array)} pictures, but not as many {name}.")
    rows = [i % len(array) for i in range(count or len(array))]

    def load(chosen: Sequence[int], size: tuple[int, int]) -> Tensor:
        return torch.stack([fit_picture(Image.fromarray(array[rows[i]]), size) for i in chosen])

    return ImageSource(
        file.stem, load, rows, None if captions is None else [captions[i] for i in rows],
        None if labels is None else [labels[i] for i in rows],
        [f"{file.name} {i}" for i in rows], lambda row: (array.shape[1], array.shape[2]),
        contents=lambda row: array[rows[row]].tobytes(),
    )  # fmt: skip


def _labels(array: np.ndarray) -> list[str] | list[int]:
    """Names or numbers of classes (N,)."""
    if array.ndim == 1 and array.dtype.kind in "biuf" and not (array % 1).any():  # NaN and infinity have a rest
        return [int(value) for value in array]
    return texts_of(array)


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Of an array, from its header alone."""
    with archive.open(name) as stream:
        shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it has pickled objects")
    if (size := int(np.prod(shape, dtype=np.float64)) * dtype.itemsize) > LIMIT:
        raise ValueError(f"the array {name!r} has {size / 2**30:.0f} GiB, and {LIMIT / 2**30:.0f} are read at most")
    return shape


def _chosen(file: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """The name of the array of pictures."""
    fitting = [name for name, shape in shapes.items() if _layout(shape) is not None]
    named = [name for name in NAMES if name in fitting] or fitting
    if len(named) != 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        raise ValueError(f"{str(file)!r} has no array of pictures (N, H, W, 3) named arr_0 or images. It has {found}.")
    return named[0]


def _layout(shape: Sequence[int]) -> str | None:
    """How pictures lie in an array of this shape, or None if there are none in it."""
    if 0 in shape or len(shape) not in (3, 4):
        return None
    if len(shape) == 3:
        return "NHW"
    return "NHWC" if shape[3] in (1, 3) else "NCHW" if shape[1] in (1, 3) else None


def _as_bytes(file: Path, pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    layout = _layout(pictures.shape)
    if pictures.dtype.kind == "f":
        low, high = (float(pictures.min()), float(pictures.max())) if np.isfinite(pictures).all() else (-np.inf, np.inf)
        if low < -1.001 or high > 1.001:
            raise ValueError(f"{str(file)!r} has numbers from {low:g} to {high:g}. Give bytes, or numbers in [0, 1] or [-1, 1].")
        scaled = (pictures + 1) / 2 if low < 0 else pictures
        pictures = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    if pictures.dtype != np.uint8:
        raise ValueError(f"{str(file)!r} has pictures of {pictures.dtype}. Give bytes, or numbers in [0, 1] or [-1, 1].")
    if layout == "NCHW":
        pictures = pictures.transpose(0, 2, 3, 1)
    if layout == "NHW":
        pictures = pictures[..., None]
    return np.ascontiguousarray(np.broadcast_to(pictures, (*pictures.shape[:3], 3)))
