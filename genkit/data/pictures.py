"""Image files, of whatever kind, as the pictures that models see: found, read as RGB, and resized.

Resizing is that of the published diffusion classifiers: the short side to the model's size by antialiased bicubic interpolation,
then the centre.
"""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FRAMES = "has several frames; the first one is read"
ALPHA = "is transparent; it is put on white"


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """The image files of files, folders (searched recursively) and glob patterns, each file once.

    Arguments keep their order; what one folder or pattern holds is sorted. A file that is named counts whatever its suffix, in a
    folder those in `SUFFIXES` do. Hidden files are passed over, and in a folder of `genkit sample` its contact sheet and heat maps.

    Raises:
        FileNotFoundError: there is no such file or folder, or the pattern matches none.
        ValueError: a folder without images, or nothing was named.

    Example:
        >>> find_pictures(["cat.png", "dogs", "more/*.jpg"])
    """
    found: dict[Path, Path] = {}  # by what they resolve to, since one file may be reached by several names
    for path in paths:
        for file in _expand(str(path)):
            found.setdefault(file.resolve(), file)
    if not found:
        raise ValueError("There are no images. Name files, folders or patterns.")
    return list(found.values())


def _expand(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
        if not files:
            raise ValueError(f"{name!r} holds no images ({', '.join(SUFFIXES)}).")
        return _without_sheets(path, files)
    if path.exists():
        return [path]
    if not glob.has_magic(name):
        raise FileNotFoundError(f"There is no file or folder {name!r}.")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise FileNotFoundError(f"No file matches {name!r}.")
    return files


def _without_sheets(root: Path, files: list[Path]) -> list[Path]:
    """Without what `genkit sample` draws of its images beside them (a contact sheet, heat maps); a recipe tells its folders."""
    from genkit.gallery import HEATMAPS, SHEET

    owners: dict[Path, Path] = {}
    for file in files:
        maps = next((p for p in file.parents if p.name == HEATMAPS and root in p.parents), None)
        if maps is not None or file.name == SHEET:
            owners[file] = file.parent if maps is None else maps.parent
    images = [file for file in files if file not in owners and file.suffix.lower() == ".png"]
    made = {owner for owner in set(owners.values()) if _carries_recipe(next((i for i in images if owner in i.parents), None))}
    return [file for file in files if owners.get(file) not in made]


def _carries_recipe(file: Path | None) -> bool:
    from genkit.recipe import read_recipe

    if file is not None:
        with contextlib.suppress(ValueError, OSError):
            read_recipe(file)
            return True
    return False


def read_picture(file: str | Path) -> tuple[Image.Image, list[str]]:
    """An image file as an upright RGB picture.

    Any format that Pillow reads. EXIF orientation is applied, 16 bits of grey are scaled to 8, transparency is put on white, and
    of several frames or pages the first is read.

    Returns:
        The picture, and what is worth telling about it: any of `FRAMES`, `ALPHA`.

    Raises:
        ValueError: no image, truncated, damaged, larger than `PIL.Image.MAX_IMAGE_PIXELS` (89 million pixels), or with pixels
            that have no defined white. The message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata; what matters becomes an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                # A phone's MPO is a photo with a preview, no animation.
                notes = [FRAMES] if getattr(image, "n_frames", 1) > 1 and image.format != "MPO" else []
                image.seek(0)
                image.load()
                return to_rgb(image), notes + ([ALPHA] if _has_alpha(image) else [])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
        raise ValueError(f"The image {str(file)!r} has more than {limit} pixels. Make it smaller.") from error
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ValueError(f"The image {str(file)!r} cannot be read ({str(error) or type(error).__name__}).") from error


def picture_size(file: str | Path) -> tuple[int, int]:
    """(height, width) of an image file as `read_picture` gives it, from its header.

    Raises:
        ValueError: no image; the message names the file.
    """
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by a quarter
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ValueError(f"The image {str(file)!r} cannot be read ({str(error) or type(error).__name__}).") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright RGB, transparent parts on white.

    Raises:
        ValueError: 32-bit pixels, of which nobody knows how much is white, or a mode without a conversion.
    """
    image = ImageOps.exif_transpose(image)
    if _has_alpha(image):
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image)
        if grey.dtype.kind == "f" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"pixels of mode {image.mode} have no defined white; save it with 8 or 16 bits")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    """Whether it has an alpha channel, or a colour that stands for transparent."""
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    return keyed or image.mode in ("RGBA", "LA", "PA", "RGBa", "La")


def fit_picture(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as a tensor (C, H, W) in [-1, 1] of `size` = (H, W); C is 3, or 1 for mode "L".

    Scaled by antialiased bicubic interpolation until it covers the size, then cut to its centre, as torchvision's `Resize` and
    `CenterCrop` do.
    """
    pixels = torch.from_numpy(np.asarray(_cover(image, size, Image.Resampling.BICUBIC)).copy()).reshape(*size, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def fit_mask(file: Path, size: tuple[int, int]) -> Tensor:
    """A label map (H, W) int64 of `size` from a picture whose grey values or palette indices are classes; cut as by `fit_picture`.

    Raises:
        ValueError: no image, or one in colours; the message names the file.
    """
    try:
        with Image.open(file) as image:
            image.load()
            if image.mode not in ("L", "P", "1"):
                raise ValueError(f"its mode is {image.mode}, but a label map has grey values or a palette")
            labels = Image.fromarray(np.asarray(image).astype(np.uint8))
    except Exception as error:  # decoders of damaged files raise almost anything
        raise ValueError(f"The label map {str(file)!r} cannot be read ({str(error) or type(error).__name__}).") from error
    return torch.from_numpy(np.asarray(_cover(labels, size, Image.Resampling.NEAREST)).astype(np.int64))


def _cover(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """A picture scaled until it covers a size (H, W), then cut to its centre."""
    height, width = size
    # Only what will be kept is computed, so that a long thin picture does not become a huge one.
    tall, wide = height, image.width * height // image.height
    if wide < width:
        tall, wide = image.height * width // image.width, width
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    x, y = image.width / wide, image.height / tall
    box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
    return image if image.size == (width, height) else image.resize((width, height), resample, box=box)
