"""Real images as clean latents: encoded once, kept in shards.

Pictures of many aspect ratios go to a few sizes, each to the one of the nearest aspect ratio,

    argmin over sizes of | log(height / width) - log(picture's height / width) |

of equal ones to the nearest in area; scaled until it is covered, then cut to its centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.distill.data import latent_space
from genkit.distill.shards import ENCODED, STORAGE, Content, Part, fill, identity
from genkit.errors import unknown
from genkit.features.cache import model_identity
from genkit.ranks import Ranks

SHARD = 500  # images in a file; an interruption costs at most one

Size = tuple[int, int]


def encode(
    source: ImageSource,
    denoiser: Denoiser,
    folder: Path,
    *,
    sizes: Sequence[Size] | None,
    storage: str,
    skip_bad: bool,
    batch_size: int,
    ranks: Ranks,
    progress: Callable[[int], None],
) -> None:
    """Encode a source into a folder, or what is missing of it; see `open_data` for the arguments.

    Raises:
        ValueError: unreadable pictures (how many, and the first), or as `genkit.distill.shards.fill` and `nearest_size`.
        OSError: as `genkit.distill.shards.fill`.
    """
    if storage not in STORAGE:
        raise unknown("storage", storage, STORAGE)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    encoder = _Encoder(source, denoiser, sizes, batch_size, progress)
    settings = {
        "model": model_identity(denoiser.pipe), "space": latent_space(denoiser), "data": source.name, "count": len(source),
        "names": identity(source.names), "texts": identity([source.captions, source.labels]),
        "sizes": [list(size) for size in encoder.sizes], "storage": storage,
    }  # fmt: skip
    fill(folder, ENCODED, settings, encoder.parts(), encoder.make, resume=True, skipped=skip_bad, ranks=ranks, progress=progress)
    bad = ranks.gather(encoder.bad)
    if bad and not skip_bad:
        raise ValueError(
            f"{len(bad)} of {len(source)} images cannot be read. The first: {bad[0]} "
            "Repair them and go on, or leave them out with --skip-bad."
        )


def nearest_size(sizes: Sequence[Size], height: int, width: int) -> Size:
    """The size, of several (height, width), with the aspect ratio nearest to a picture's; of equal ones the nearest in area."""

    def distance(size: Size) -> tuple[float, float]:
        ratio = math.log(size[0] / size[1]) - math.log(height / width)
        return round(abs(ratio), 6), abs(math.log(size[0] * size[1]) - math.log(height * width))

    return min(sizes, key=distance)


class _Encoder:
    """Makes shards of a source; `bad` collects the errors of pictures that cannot be read."""

    def __init__(
        self,
        source: ImageSource,
        denoiser: Denoiser,
        sizes: Sequence[Size] | None,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> None:
        self.source, self.denoiser = source, denoiser
        self.batch_size, self.progress = batch_size, progress
        self.bad: list[str] = []
        # The model says which sizes it takes.
        wanted: Sequence[tuple[int | None, int | None]] = sizes or [(None, None)]
        shapes = [denoiser.latent_shape(height, width) for height, width in wanted]
        self.sizes: list[Size] = [(h * denoiser.factor, w * denoiser.factor) for _, h, w in shapes]
        self._size_of = source.sizes
        if len(self.sizes) > 1 and self._size_of is None:
            raise ValueError(f"{source.name!r} does not say how large its pictures are, so they go to one size. Give one.")
        self._shapes = dict(zip(self.sizes, shapes, strict=True))

    def parts(self) -> list[Part]:
        """Shards of one size each."""
        rows: dict[Size, list[int]] = {size: [] for size in self.sizes}
        for row in range(len(self.source)):
            rows[self._size(row)].append(row)
        return [
            Part(chosen[i : i + SHARD], self._shapes[size]) for size, chosen in rows.items() for i in range(0, len(chosen), SHARD)
        ]

    def _size(self, row: int) -> Size:
        if len(self.sizes) == 1 or self._size_of is None:
            return self.sizes[0]
        try:
            return nearest_size(self.sizes, *self._size_of(row))
        except ValueError:
            return self.sizes[0]  # unreadable: `make` finds it there

    @torch.no_grad()
    def make(self, part: Part) -> Content:
        """The items of a shard that can be read."""
        size = next(size for size, shape in self._shapes.items() if shape == part.shape)
        found: list[int] = []
        skipped: list[str] = []
        latents = [torch.empty(0, *part.shape)]
        for i in range(0, len(part.rows), self.batch_size):
            rows = part.rows[i : i + self.batch_size]
            images, readable = self._read(rows, size, skipped)
            if readable:
                latents.append(self.denoiser.encode(images.to(self.denoiser.device)).float().cpu())
            found += readable
            self.progress(len(rows))
        texts: dict[str, list[Any] | None] = {"prompts": self.source.captions, "labels": self.source.labels}
        described = {key: [values[row] for row in found] for key, values in texts.items() if values is not None}
        return {"latents": torch.cat(latents)}, {**described, "skipped": skipped}

    def _read(self, rows: Sequence[int], size: Size, skipped: list[str]) -> tuple[Tensor, list[int]]:
        """The pictures of some rows that can be read, and which rows these are; the names of the others go to `skipped`."""
        try:
            return self.source.images(rows, size), list(rows)
        except ValueError as error:
            if len(rows) > 1:
                parts = [self._read([row], size, skipped) for row in rows]
                return torch.cat([images for images, _ in parts]), [row for _, readable in parts for row in readable]
            self.bad.append(str(error))
            skipped.append(str(rows[0]) if self.source.names is None else self.source.names[rows[0]])
            return torch.empty(0, 3, *size), []
