"""The data of a distillation: clean latents with their prompts or labels, from a teacher (`genkit synth`) or from real images.

Batches have one shape. In each epoch the items of every shape are shuffled and cut into batches, and the batches of all shapes are
shuffled; what does not fill a batch of its shape waits for another epoch. The rows of a step are a function of (sizes, batch size,
seed, step) alone, so a resumed run, and any number of processes, see the same data.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from genkit import noise
from genkit.data.source import open_source
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.text import TextDenoiser
from genkit.distill.shards import Shard, difference, identity, read_record, settings_of, shard_file
from genkit.ranks import Ranks

MEMORY = 2**29  # bytes: latents up to this size are held in memory, and as many of embeddings
_ORDER = 60  # a stream of `genkit.noise` of its own, so that the order has nothing to do with what is drawn for training


def latent_space(denoiser: Denoiser) -> dict[str, Any]:
    """What two models must share to use the same latents: channels, and the codec's scale, shift, mean, std and factor."""
    codec = denoiser.codec
    space: dict[str, Any] = {"channels": denoiser._channels(), "factor": denoiser.factor}
    if codec is not None:
        statistics = {name: None if v is None else list(v) for name, v in (("mean", codec.mean), ("std", codec.std))}
        space |= {"scale": codec.scale, "shift": codec.shift, **statistics}
    return space


class LatentDataset:
    """Clean latents by row, with what they show. Latents of more than `memory` bytes are read from the disk as they are needed.

    Args:
        folder: made by `genkit synth` or `open_data`.
        skip_bad: leave out shards that are missing or unreadable, and do with fewer pictures than were to be encoded.
        memory: bytes of latents that are held in memory, and of embeddings of prompts.

    Attributes:
        record: how the items were made; "space" is their latent space.
        buckets: rows of each shape (c, h, w).
        prompts, labels: of each row, or None.
        seeds: of each row's initial noise, or None for real images.
        paired: each item is what its initial noise becomes under a deterministic sampler.
        skipped: what was left out: names of shards and of pictures.

    Raises:
        FileNotFoundError: the folder holds no latents.
        ValueError: shards that are missing or unreadable (how many, and the first), a damaged record, or no items.

    Example:
        >>> data = open_data("data", pipe.denoiser)
        >>> rows = batch_rows(data, 64, seed=0, step=12)
        >>> x0, cond = data.latents(rows), data.condition(pipe.denoiser, rows)
    """

    def __init__(self, folder: str | Path, *, skip_bad: bool = False, memory: int = MEMORY) -> None:
        self.folder = Path(folder)
        record = read_record(self.folder)
        if record is None:
            raise FileNotFoundError(f"{str(folder)!r} holds no latents. Make them with `genkit synth --out {folder}`.")
        self.record = record
        self._shards, self.skipped = _open_shards(self.folder, record, skip_bad)
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        if not len(self):
            raise ValueError(f"{str(folder)!r} holds no items.")
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for shard, end in zip(self._shards, self._ends, strict=True):
            self.buckets.setdefault(shard.shapes["latents"][1:], []).extend(range(end - len(shard), end))
        self.prompts: list[str] | None = self._listed("prompts")
        self.labels: list[int | str] | None = self._listed("labels")
        self.seeds: list[int] | None = None
        if all("seed" in shard.shapes for shard in self._shards):
            self.seeds = [seed for shard in self._shards for seed in shard.read("seed", range(len(shard))).tolist()]
        self.paired: bool = all(shard.metadata.get("paired", False) for shard in self._shards)
        stored = sum(math.prod(shard.shapes["latents"]) for shard in self._shards) * getattr(torch, record["storage"]).itemsize
        self._keep, self._memory = stored <= memory, memory
        self._encoded: WeakKeyDictionary[Denoiser, set[str]] = WeakKeyDictionary()  # the prompts that a model has kept

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes (c, h, w) that there are."""
        return list(self.buckets)

    def latents(self, rows: Sequence[int]) -> Tensor:
        """Clean latents (B, c, h, w) of rows of one shape, float32.

        Raises:
            ValueError: rows of several shapes.
            IndexError: a row that there is not.
        """
        self._shape(rows)
        return self._gather("latents", rows, keep=self._keep).float()

    def noise(self, rows: Sequence[int]) -> Tensor:
        """The initial noise (B, c, h, w) from which a teacher made the latents of rows of one shape, float32.

        Raises:
            ValueError: real images, or a sampler that adds noise of its own: then they are no pairs.
        """
        if self.seeds is None or not self.paired:
            made = "real images" if self.seeds is None else f"of the sampler {self.record['sampler']!r}, which adds noise"
            raise ValueError(f"The items of {str(self.folder)!r} are {made}, so none is a function of its initial noise.")
        return noise.normal([self.seeds[row] for row in rows], self._shape(rows))

    def condition(self, denoiser: Denoiser, rows: Sequence[int]) -> Cond:
        """The condition of some rows for a model: the stored embeddings if there are any, else of the prompts or labels.

        A text model keeps each prompt that it has encoded; for 100,000 different ones store embeddings (`genkit synth --embeds`).

        Raises:
            ValueError: the model needs prompts or labels, and the data has none.
        """
        names = [name.removeprefix("cond.") for name in self._shards[0].shapes if name.startswith("cond.")]
        if names:
            return self._stored(names, rows).to(denoiser.device)
        if isinstance(denoiser, TextDenoiser):
            prompts = self._described("prompts", self.prompts, denoiser, rows)
            # Each new one alone: in a batch its embedding would, to rounding, depend on which others were new.
            encoded = self._encoded.setdefault(denoiser, set())
            for prompt in dict.fromkeys(prompts):
                if prompt not in encoded:
                    denoiser.condition(prompts=prompt)
                    encoded.add(prompt)
            return denoiser.condition(prompts=prompts)
        if getattr(denoiser, "num_classes", None) is None:
            return denoiser.condition()
        return denoiser.condition(labels=self._described("labels", self.labels, denoiser, rows))

    def encode_prompts(self, denoiser: Denoiser) -> bool:
        """Encode every prompt now, if their embeddings take at most `memory` bytes.

        Returns:
            Whether conditions need no text encoder of the model, or copy of it, any more.
        """
        example = self.condition(denoiser, [0])
        if not isinstance(denoiser, TextDenoiser) or any(name.startswith("cond.") for name in self._shards[0].shapes):
            return True
        row_of = {prompt: row for row, prompt in enumerate(self.prompts or [])}
        if len(row_of) * sum(value.nbytes for value in example.tensors.values()) > self._memory:
            return False
        for row in row_of.values():
            self.condition(denoiser, [row])
        return True

    def _described(self, kind: str, values: list[Any] | None, denoiser: Denoiser, rows: Sequence[int]) -> list[Any]:
        if values is None:
            raise ValueError(f"{denoiser.family} is conditioned on {kind}, but the data in {str(self.folder)!r} has none.")
        return [values[row] for row in rows]

    def _stored(self, names: Sequence[str], rows: Sequence[int]) -> Cond:
        tensors = {name: _wide(self._gather(f"cond.{name}", rows)) for name in names}
        first = self._shards[0]
        null = {name: _wide(first.read(f"null.{name}", [0], keep=True)) for name in names if f"null.{name}" in first.shapes}
        return Cond(tensors, {name: value.expand(len(rows), *value.shape[1:]) for name, value in null.items()} or None)

    def _listed(self, kind: str) -> list[Any] | None:
        if not all(kind in shard.metadata for shard in self._shards):
            return None
        return [value for shard in self._shards for value in shard.metadata[kind]]

    def _find(self, row: int) -> int:
        """The shard of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"There is no row {row}: the data has {len(self)}.")
        return bisect.bisect_right(self._ends, row)

    def _shape(self, rows: Sequence[int]) -> tuple[int, ...]:
        shapes = {self._shards[self._find(row)].shapes["latents"][1:] for row in rows}
        if len(shapes) != 1:
            raise ValueError(f"The rows have latents of {len(shapes)} shapes ({sorted(shapes)}). Take rows of one bucket.")
        return shapes.pop()

    def _gather(self, name: str, rows: Sequence[int], *, keep: bool = False) -> Tensor:
        """Some rows of a tensor, from whichever shards they are in."""
        places: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(self._find(row), []).append(i)
        result: Tensor | None = None
        for number, positions in places.items():
            shard = self._shards[number]
            start = self._ends[number] - len(shard)
            values = shard.read(name, [rows[i] - start for i in positions], keep=keep)
            if result is None:
                result = values.new_empty(len(rows), *values.shape[1:])
            result[positions] = values
        assert result is not None
        return result


def _wide(value: Tensor) -> Tensor:
    """Floating-point numbers as float32: autocast to bfloat16 refuses to join float16 ones."""
    return value.float() if value.is_floating_point() else value


def _open_shards(folder: Path, record: dict[str, Any], skip_bad: bool) -> tuple[list[Shard], list[str]]:
    """The shards that can be read, and the names of what was left out."""
    shards, bad, skipped = [], {}, []
    settings = identity(settings_of(record))
    for number, entry in enumerate(record["shards"]):
        file = shard_file(folder, number)
        try:
            shard = Shard(file, settings)
            if shard.shapes["latents"][1:] != tuple(entry["shape"]):
                raise ValueError("it has latents of another shape than the record says")
        except ValueError as error:
            bad[file.name] = str(error)
            continue
        skipped += shard.metadata.get("skipped", [])
        if len(shard):
            shards.append(shard)
    if bad and not skip_bad:
        name, reason = next(iter(bad.items()))
        raise ValueError(
            f"{len(bad)} of {len(record['shards'])} shards in {str(folder)!r} are missing or unreadable, the first {name!r}: "
            f"{reason}. Make them again with --resume, or leave them out with --skip-bad."
        )
    return shards, [*bad, *skipped]


class Bucketed(Protocol):
    """What has rows of several shapes."""

    @property
    def buckets(self) -> Mapping[tuple[int, ...], Sequence[int]]:
        """Rows of each shape."""
        ...


def batch_rows(dataset: Bucketed, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of the batch of a step: of one shape, every row once an epoch but for those that fill no batch.

    Args:
        batch_size: rows in a batch, of all processes together.
        seed: of the order, from 0.
        step: from 0; epochs follow each other.

    Raises:
        ValueError: no shape has as many rows.
    """
    buckets = list(dataset.buckets.values())
    sizes = tuple(len(rows) for rows in buckets)
    batches = sum(size // batch_size for size in sizes) if batch_size > 0 else 0
    if not batches:
        raise ValueError(
            f"A batch of {batch_size} cannot be filled: {_count(sizes)}. Use a batch size from 1 to {max(sizes)}, or more data."
        )
    epoch, position = divmod(step, batches)
    bucket, chosen = _epoch(sizes, batch_size, seed, epoch)[position]
    return [buckets[bucket][i] for i in chosen]


def _count(sizes: Sequence[int]) -> str:
    return f"there are {sizes[0]} items" if len(sizes) == 1 else f"the largest of {len(sizes)} shapes has {max(sizes)} items"


@functools.lru_cache(maxsize=4)
def _epoch(sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> list[tuple[int, list[int]]]:
    """The batches of an epoch: number of the bucket, and positions within it."""
    generator = torch.Generator().manual_seed(noise.mix((seed << 32) + epoch, _ORDER))
    batches = []
    for bucket, size in enumerate(sizes):
        order = torch.randperm(size, generator=generator).tolist()
        batches += [(bucket, order[i : i + batch_size]) for i in range(0, size - batch_size + 1, batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def open_data(
    name: str | Path,
    denoiser: Denoiser,
    *,
    cache: str | Path | None = None,
    count: int | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    storage: str = "float16",
    skip_bad: bool = False,
    batch_size: int = 32,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> LatentDataset:
    """The data of a name: a folder of `genkit synth`, or real images, which are encoded once into the folder `cache`.

    Args:
        name: a folder of latents, a folder of images, "digits" or "digits-test", see `genkit.data.source.open_source`.
        denoiser: the teacher, whose latent space and condition the data must fit.
        cache: of encoded images; what is there already is used.
        count: images wanted; a folder with fewer is repeated, digits come in other colours (16,000 by default).
        sizes: (height, width) in pixels to which images are scaled and cut, each to the one of the nearest aspect ratio; by default
            the model's own.
        storage: "float16" or "float32", of encoded images.
        skip_bad: leave out what is missing or unreadable, instead of stopping.
        batch_size: images encoded at a time.
        ranks: processes that share the encoding, after `Ranks.join`.
        progress: called with the number of images that are encoded since the last call.

    Raises:
        ValueError: no such data, unreadable images or shards (how many, and the first), a cache that was made otherwise, data of
            another latent space, or without the prompts or labels that the model needs.
        OSError: the cache cannot be written or the disk is full; finished shards stay.

    Example:
        >>> data = open_data("photos", pipe.denoiser, cache="run/data", sizes=[(512, 512), (448, 576), (576, 448)])
    """
    from genkit.distill.encode import encode

    if Path(name).is_dir() and read_record(Path(name)) is not None:
        data = LatentDataset(name, skip_bad=skip_bad)
    else:
        source = open_source(name, count)
        if cache is None:
            raise ValueError(f"The images of {source.name!r} are encoded into a folder. Give cache=FOLDER.")
        encode(
            source, denoiser, Path(cache), sizes=sizes, storage=storage, skip_bad=skip_bad, batch_size=batch_size,
            ranks=ranks or Ranks(), progress=progress or (lambda images: None),
        )  # fmt: skip
        data = LatentDataset(cache, skip_bad=skip_bad)
    differs = difference(data.record["space"], latent_space(denoiser))
    if differs:
        raise ValueError(f"The data in {str(data.folder)!r} is of another latent space than the model: {differs}.")
    data.condition(denoiser, [0])  # refuses data without what the model is conditioned on
    return data
