"""Real images for training: an embedded data set or a folder, with captions or class names where there are any."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.pictures import find_pictures, fit_mask, fit_picture, picture_size, read_picture

if TYPE_CHECKING:
    from genkit.data.digits import DigitBatch

COLORINGS = 4  # how often each handwritten digit appears, in other colours


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Real images by row.

    Args:
        name: for records and messages.
        load: `(rows, (height, width)) -> images (B, 3, H, W)` in [-1, 1].
        groups: for each row the picture it shows; rows of one picture are never split between training and validation.
        captions: a text for each row, or None.
        labels: a class name or index for each row, or None.
        names: what each row is called: its file's path below the folder, or the number of the handwritten digit.
        sizes: `row -> (height, width)` of its picture, or None if they are not known.
        masks: `(rows, (height, width)) -> label maps (B, H, W)` int64, a class for each pixel, 255 where there is none; or None.
        masked: for each row whether it has a label map, or None.
        contents: `row -> bytes` that the picture is made from, so that it is known again; or None.
    """

    name: str
    load: Callable[[Sequence[int], tuple[int, int]], Tensor]
    groups: list[int]
    captions: list[str] | None = None
    labels: list[str | int] | None = None
    names: list[str] | None = None
    sizes: Callable[[int], tuple[int, int]] | None = None
    masks: Callable[[Sequence[int], tuple[int, int]], Tensor] | None = None
    masked: list[bool] | None = None
    contents: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def images(self, rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of some rows, `size` = (height, width)."""
        return self.load(rows, size)

    def subset(self, rows: Sequence[int]) -> ImageSource:
        """The source of some of its rows."""
        picked: dict[str, Any] = {
            field: None if (values := getattr(self, field)) is None else [values[row] for row in rows]
            for field in ("groups", "captions", "labels", "names", "masked")
        }
        load, sizes, masks, contents = self.load, self.sizes, self.masks, self.contents
        return dataclasses.replace(
            self, load=lambda chosen, size: load([rows[i] for i in chosen], size),
            sizes=None if sizes is None else lambda i: sizes(rows[i]),
            masks=None if masks is None else lambda chosen, size: masks([rows[i] for i in chosen], size),
            contents=None if contents is None else lambda i: contents(rows[i]), **picked,
        )  # fmt: skip

    def held(self, size: tuple[int, int], device: str | torch.device = "cpu") -> ImageSource:
        """The source with all its pictures of one size (height, width) in a device's memory, which then are the same bit for bit.

        Of other sizes they are made as before. For GPUs, which otherwise wait until a CPU has read and scaled each batch.
        """
        pictures = torch.cat([self.images(range(i, min(i + 256, len(self))), size).to(device) for i in range(0, len(self), 256)])
        load = self.load

        def find(rows: Sequence[int], wanted: tuple[int, int]) -> Tensor:
            if tuple(wanted) != tuple(size):
                return load(rows, wanted)
            return pictures[torch.tensor(list(rows), device=pictures.device)]

        return dataclasses.replace(self, load=find)


def open_source(name: str | Path, count: int | None = None, *, masks: str | Path | None = None) -> ImageSource:
    """The source of a name: "digits" (the training digits), "digits-test" (the held-out ones), a folder of images, or FILE.npz.

    A folder's captions come from `metadata.jsonl` ({"file_name": ..., "text": ...} on each line, as Hugging Face has it) or from
    NAME.txt beside each image; its labels from the names of its subfolders.

    An .npz has its pictures as `arr_0`, as `images` or as its only array of such a shape: (N, H, W, 3), (N, 3, H, W) or (N, H, W)
    of bytes, or of numbers in [0, 1] or [-1, 1]; and perhaps `captions` (N,) and `labels` (N,). Pickled arrays are refused.

    Args:
        count: rows wanted; a folder or file with fewer images is repeated.
        masks: folder of label maps of a folder's images, as far as there are any: for a/b.jpg the picture a/b.png, whose grey
            values or palette indices are classes, 255 for none. Digits have their own, see `genkit.data.digits.label_maps`.

    Raises:
        ValueError: no such source, a folder without images, captions for some images only, or a folder without label maps.
    """
    if str(name) == "digits":
        return _digits("train", count or 4000 * COLORINGS)
    if str(name) == "digits-test":
        return _digits("test", count or 1000)
    folder = Path(name)
    if folder.suffix == ".npz" and folder.is_file():
        from genkit.data.arrays import open_arrays

        return open_arrays(folder, count)
    if not folder.is_dir():
        raise ValueError(f"There is no data {str(name)!r}. Give 'digits', 'digits-test', a folder of images or FILE.npz.")
    source = _folder(folder, count)
    return source if masks is None else _with_masks(source, Path(masks))


def _digits(split: str, count: int) -> ImageSource:
    from genkit.data import digits

    batch = digits.draw(split, count, seed=77)
    # Mostly the canonical caption, else what people type, down to the null prompt: what is conditional should know them all.
    rng = np.random.default_rng(77)
    attributes = zip(batch.captions(), batch.attributes(), strict=True)
    captions = [full if rng.random() < 0.6 else digits.training_caption(row, rng) for full, row in attributes]
    return digit_source("digits" if split == "train" else f"digits-{split}", split, batch, captions)


def digit_source(name: str, split: str, batch: DigitBatch, captions: list[str]) -> ImageSource:
    """The source of digits that were drawn from a split without augmentation."""
    from genkit.data import digits

    def load(rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        images = batch.images[list(rows)]
        if size != images.shape[-2:]:
            images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return images

    labels: list[str | int] = [digits.DIGITS[digit] for digit in batch.digit.tolist()]
    strokes = batch.stroke.tolist()
    names = [f"{split} digit {stroke}" for stroke in strokes]

    def masks(rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        maps = digits.label_maps(split, batch.stroke[list(rows)])
        return torch.nn.functional.interpolate(maps[:, None].float(), size, mode="nearest-exact")[:, 0].long()

    return ImageSource(name, load, strokes, captions, labels, names, lambda row: (digits.SIZE, digits.SIZE), masks,
                       [True] * len(strokes), lambda row: batch.images[row].numpy().tobytes())  # fmt: skip


def _folder(folder: Path, count: int | None) -> ImageSource:
    files = find_pictures([folder])
    captions = _captions(folder, files)
    subfolders = all(file.parent != folder for file in files)
    labels: list[str | int] | None = [file.parent.name for file in files] if subfolders else None
    groups = [i % len(files) for i in range(count or len(files))]

    def load(rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        return torch.stack([fit_picture(read_picture(files[groups[row]])[0], size) for row in rows])

    return ImageSource(
        folder.name, load, groups,
        None if captions is None else [captions[i] for i in groups], None if labels is None else [labels[i] for i in groups],
        [files[i].relative_to(folder).as_posix() for i in groups], lambda row: picture_size(files[groups[row]]),
        contents=lambda row: files[groups[row]].read_bytes(),
    )  # fmt: skip


def _with_masks(source: ImageSource, folder: Path) -> ImageSource:
    """A folder's source with the label maps of another folder."""
    files = [(folder / name).with_suffix(".png") for name in source.names or []]
    masked = [file.is_file() for file in files]
    if not any(masked):
        raise ValueError(f"{str(folder)!r} has no label maps of {source.name!r}: there is no {files[0].name}, for instance.")

    def masks(rows: Sequence[int], size: tuple[int, int]) -> Tensor:
        return torch.stack([fit_mask(files[row], size) for row in rows])

    return dataclasses.replace(source, masks=masks, masked=masked)


def _captions(folder: Path, files: list[Path]) -> list[str] | None:
    """A caption for each file, or None if there are none."""
    table: dict[Path, str] = {}
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        for i, line in enumerate(metadata.read_text(encoding="utf-8").splitlines()):
            try:
                entry = json.loads(line)
                table[folder / entry["file_name"]] = str(entry["text"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'{metadata}, line {i + 1} is not {{"file_name": ..., "text": ...}}.') from error
    for file in files:
        if file not in table and file.with_suffix(".txt").is_file():
            table[file] = file.with_suffix(".txt").read_text(encoding="utf-8").strip()
    missing = [file for file in files if file not in table]
    if table and missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no caption, for instance {missing[0].name!r}. Caption all, or none."
        )
    return [table[file] for file in files] if table else None
