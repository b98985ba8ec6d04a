"""The data of DreamTeacher: pictures for the backbone, and the teacher's clean samples of them.

A latent teacher's samples are encoded once, into shards on the disk, since its encoder would cost as much as its features. Features
themselves are not kept: they are a hundred times the size of a picture (ADM-256: 2.95 million values), and fresh noise in each step
is what augments them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.distill.data import LatentDataset, batch_rows, latent_space
from genkit.distill.dreamteacher_regressors import resize
from genkit.distill.encode import encode
from genkit.distill.shards import difference, identity, settings_of
from genkit.features.probe import classes_of, targets_of
from genkit.ranks import Ranks

Size = tuple[int, int]
HELD = 2**31  # bytes: pictures up to this size are held in a GPU's memory


class Pictures:
    """Pictures by row, as the backbone and as the teacher get them.

    Args:
        data: real pictures, or latents that `genkit synth` made of the teacher.
        denoiser: the teacher.
        size: (height, width) of the backbone's pictures.
        cache: folder for encoded pictures.
        flip: the mirror images too, of real pictures.
        ranks, progress: of the encoding, see `genkit.distill.open_data`.

    Attributes:
        identity: of the data, for records.
        buckets: rows of each shape; there is one.

    Raises:
        ValueError: latents of another latent space or size, or a teacher that takes no RGB pictures.

    Example:
        >>> pictures = Pictures(open_source("digits"), pipe.denoiser, (64, 64), Path("run/data"))
        >>> rows = batch_rows(pictures, 128, seed=0, step=0)
        >>> pictures.pictures(rows), pictures.clean(rows)
    """

    def __init__(
        self,
        data: ImageSource | LatentDataset,
        denoiser: Denoiser,
        size: Size,
        cache: Path,
        *,
        flip: bool = False,
        ranks: Ranks | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.denoiser, self.size = denoiser, size
        channels, height, width = denoiser.latent_shape(None, None)
        self._teacher_size = height * denoiser.factor, width * denoiser.factor
        if denoiser.codec is None and channels != 3:
            raise ValueError(
                f"The teacher takes pictures of {channels} channels, but a backbone learns from RGB. Use another teacher."
            )
        self.source: ImageSource | None = None if isinstance(data, LatentDataset) else data
        self.latents: LatentDataset | None = data if isinstance(data, LatentDataset) else None
        if self.latents is not None:
            differs = difference(self.latents.record["space"], latent_space(denoiser))
            if differs:
                raise ValueError(
                    f"The data in {str(self.latents.folder)!r} is of another latent space than the teacher: {differs}."
                )
            own = (channels, height, width)
            if self.latents.shapes != [own]:
                there = ", ".join(map(str, self.latents.shapes))
                raise ValueError(
                    f"The data has samples of shape {there}, but the teacher's features are those of {own}. Make others."
                )
            self.identity = f"{len(self.latents)} samples, {identity(settings_of(self.latents.record))}"
            return
        assert self.source is not None
        if flip:
            self.source = both_ways(self.source)
        self.identity = f"{len(self.source)} pictures of {self.source.name}, {identity(self.source.names)}"
        if denoiser.codec is not None:
            encode(
                self.source, denoiser, cache, sizes=[self._teacher_size], storage="float16", skip_bad=False, batch_size=32,
                ranks=ranks or Ranks(), progress=progress or (lambda pictures: None),
            )  # fmt: skip
            self.latents = LatentDataset(cache)
        device = denoiser.device
        if device.type != "cpu" and 4 * 3 * math.prod(size) * len(self.source) <= HELD:
            self.source = self.source.held(size, device)

    def __len__(self) -> int:
        return len(self.latents) if self.latents is not None else len(self.source or ())

    @property
    def buckets(self) -> Mapping[tuple[int, ...], Sequence[int]]:
        if self.latents is not None and self.source is None:
            return self.latents.buckets
        return {(): range(len(self))}

    def rows(self, batch_size: int, seed: int, step: int, ranks: Ranks) -> list[int]:
        """The rows of this process in the batch of a step; `batch_size` is that of each process."""
        return ranks.share(batch_rows(self, batch_size * ranks.world, seed, step))

    def clean(self, rows: Sequence[int]) -> Tensor:
        """The teacher's clean samples (B, c, h, w) of some rows, on its device."""
        if self.latents is not None:
            return self.latents.latents(rows).to(self.denoiser.device)
        assert self.source is not None
        return self.source.images(rows, self._teacher_size).to(self.denoiser.device)

    @torch.no_grad()
    def pictures(self, rows: Sequence[int]) -> Tensor:
        """The backbone's pictures (B, 3, H, W) in [-1, 1] of some rows, on the teacher's device."""
        if self.source is not None:
            return self.source.images(rows, self.size).to(self.denoiser.device)
        return resize(self.denoiser.decode(self.clean(rows)).float().clamp(-1, 1), self.size)


def both_ways(source: ImageSource) -> ImageSource:
    """A source followed by the mirror images of its rows."""
    count = len(source)

    def turned(rows: Sequence[int], values: Tensor) -> Tensor:
        mirrored = torch.tensor([row >= count for row in rows])
        return torch.where(mirrored.reshape(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)

    load, masks, sizes = source.load, source.masks, source.sizes
    twice: dict[str, Any] = {
        field: None if (values := getattr(source, field)) is None else [*values, *values]
        for field in ("groups", "captions", "labels", "names", "masked")
    }
    if twice["names"]:
        twice["names"][count:] = [f"{name}, mirrored" for name in twice["names"][count:]]
    return dataclasses.replace(
        source, load=lambda rows, size: turned(rows, load([row % count for row in rows], size)),
        masks=None if masks is None else lambda rows, size: turned(rows, masks([row % count for row in rows], size)),
        sizes=None if sizes is None else lambda row: sizes(row % count), **twice,
    )  # fmt: skip


def labelled_rows(source: ImageSource, count: int, seed: int, *, dense: bool) -> list[int]:
    """Rows whose labels are used: about `count`, of different pictures, evenly over the classes where they are known.

    Args:
        dense: label maps are what is used; pictures without one are passed over.

    Raises:
        ValueError: no labels or label maps, or fewer pictures than wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    usable = list(range(len(source)))
    if dense:
        if source.masks is None or source.masked is None:
            raise ValueError(f"{source.name!r} has no label maps. Give the folder that has them (masks).")
        usable = [row for row in usable if source.masked[row]]
    first: dict[int, int] = {}  # a row of each picture
    for row in usable:
        first.setdefault(source.groups[row], row)
    classes = [0] if dense and source.labels is None else classes_of(source)
    targets = [0] * len(source) if dense and source.labels is None else targets_of(source, classes).tolist()
    chosen: list[int] = []
    for number in range(len(classes)):
        own = [row for row in first.values() if targets[row] == number]
        wanted = max(1, round(count / len(classes)))
        if len(own) < wanted:
            raise ValueError(f"{source.name!r} has {len(own)} labelled pictures of {classes[number]!r}, but {wanted} are wanted.")
        chosen += [own[i] for i in torch.randperm(len(own), generator=generator)[:wanted].tolist()]
    return sorted(chosen)


def labels_of(source: ImageSource, rows: Sequence[int], size: Size, *, dense: bool) -> tuple[Tensor, list[str]]:
    """Classes (N,), or label maps (N, H, W), of some rows, and the names of the classes."""
    if dense:
        assert source.masks is not None
        maps = source.masks(rows, size)
        return maps, [str(i) for i in range(int(maps[maps != 255].max()) + 1)]
    classes = classes_of(source)
    return targets_of(source, classes)[list(rows)], [str(name) for name in classes]
