"""Features of a data source on disk: one memory-mapped array for each tap, and a record of how they were made.

A folder holds

    features.json       model, data, taps, t, noise, seed, pool, dtype, size; names and labels of the rows
    TAP.npy             (N, K, C, h, w) for N rows and K draws of the noise; (N, K, T, ...) with several t
    done-RANK.json      the pieces (of `PIECE` rows) that a process has finished

A piece counts as finished only after its rows are on the disk, so an interrupted run goes on where it stopped. Pieces are the same
for any number of processes, and so are the features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.features.extractor import FeatureExtractor
from genkit.files import prepare_folder, write_atomic
from genkit.guidance.origin import origin
from genkit.ranks import Ranks

PIECE = 64  # rows
RECORD = "features.json"
DTYPES = ("float16", "float32")
_SAMPLED = 16  # rows whose pixels identify the data


class FeatureCache:
    """Features on disk, opened for reading.

    Args:
        folder: made by `FeatureCache.build`.

    Attributes:
        record: how they were made: "model", "data", "taps" (shape of each), "t", "noise", "seed", "pool", "dtype", "size".
        names, labels: of each row, or None.

    Raises:
        FileNotFoundError: the folder holds no features.
        ValueError: a damaged record, or features that are not finished.

    Example:
        >>> cache = FeatureCache.build(extractor, open_source("digits", 4000), Path("features"))
        >>> cache["mid"].shape, cache["mid"].dtype          # ((4000, 1, 128, 2, 2), float16), a memory map
        >>> cache.features([0, 7])["mid"]                   # (2, 128, 2, 2) float32, the mean over draws
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        content = _read_record(self.folder)
        if content is None:
            raise FileNotFoundError(f"{str(folder)!r} holds no features: {RECORD} is missing.")
        self.record: dict[str, Any] = content["settings"]
        self.names: list[str] | None = content["names"]
        self.labels: list[str | int] | None = content["labels"]
        self.groups: list[int] = content["groups"]
        left = len(_pieces(len(self)) - _finished(self.folder))
        if left:
            raise ValueError(f"The features in {str(folder)!r} are not finished: {left} of {len(_pieces(len(self)))} pieces are "
                             "missing. Make them with --resume.")  # fmt: skip

    @classmethod
    def build(
        cls,
        extractor: FeatureExtractor,
        source: ImageSource,
        folder: str | Path,
        *,
        size: tuple[int, int] | None = None,
        dtype: str = "float16",
        batch_size: int = PIECE,
        resume: bool = False,
        ranks: Ranks | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> FeatureCache:
        """Make the features of a source, or what is missing of them.

        Args:
            size: (height, width) of the pictures in pixels; the model's own by default.
            dtype: "float16" or "float32".
            batch_size: rows at a time, at most `PIECE`.
            resume: go on with what is in the folder.
            ranks: processes that share the work, after `Ranks.join`.
            progress: called with the number of rows that are there since the last call.

        Raises:
            ValueError: features in the folder that were made otherwise (the message names both), or without `resume`; a picture
                that cannot be read.
            FloatingPointError: features that are not finite in `dtype`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"Unknown dtype {dtype!r} of features. Use {' or '.join(DTYPES)}.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        ranks, folder = ranks or Ranks(), Path(folder)
        size = size or extractor.size
        if ranks.leads:
            _prepare(folder, _settings(extractor, source, size, dtype), source, resume)
        ranks.wait()
        writer = _Writer(extractor, source, folder, size, min(batch_size, PIECE), ranks)
        writer.run(progress or (lambda rows: None))
        ranks.wait()
        return cls(folder)

    def __len__(self) -> int:
        return self.record["data"]["rows"]

    def __getitem__(self, tap: str) -> np.ndarray:
        """The memory-mapped array (N, K, ...) of a tap.

        Raises:
            ValueError: a tap that was not cached; the message lists those that were.
        """
        if tap not in self.record["taps"]:
            raise ValueError(f"There are no features of the tap {tap!r}. Cached: {', '.join(self.record['taps'])}.")
        return _open_array(self.folder, tap, self.record)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """(C, h, w) or (C,) of one row, draw and noise level, by tap."""
        skip = 1 if isinstance(self.record["t"], list) else 0
        return {tap: tuple(shape[skip:]) for tap, shape in self.record["taps"].items()}

    def features(self, rows: Sequence[int] | slice = slice(None), draw: int | None = None) -> dict[str, Tensor]:
        """float32 features (B, ...) of some rows, by tap: of one draw of the noise, or their mean."""
        found = {}
        for tap in self.record["taps"]:
            values = torch.from_numpy(np.array(self[tap][rows], dtype=np.float32))
            found[tap] = values.mean(1) if draw is None else values[:, draw]
        return found


class _Writer:
    """Makes the pieces of one process."""

    def __init__(
        self, extractor: FeatureExtractor, source: ImageSource, folder: Path, size: tuple[int, int], batch_size: int, ranks: Ranks
    ) -> None:
        self.extractor, self.source, self.folder = extractor, source, folder
        self.size, self.batch_size, self.ranks = size, batch_size, ranks
        record = _read_record(folder)
        if record is None:
            raise FileNotFoundError(f"{str(folder)!r} has lost its {RECORD}. Make the features again.")
        self.arrays = {tap.name: _open_array(folder, tap.name, record["settings"]) for tap in extractor.taps}

    def run(self, progress: Callable[[int], None]) -> None:
        mine = self.ranks.share(sorted(_pieces(len(self.source))))
        there = _finished(self.folder)
        note = self.folder / f"done-{self.ranks.index}.json"
        own = sorted(_noted(note))
        progress(sum(len(self._rows(start)) for start in mine if start in there))
        for start in mine:
            if start in there:
                continue
            rows = self._rows(start)
            for i in range(0, len(rows), self.batch_size):
                self._write(rows[i : i + self.batch_size])
                progress(len(rows[i : i + self.batch_size]))
            own.append(start)
            write_atomic(note, json.dumps(own).encode())

    def _rows(self, start: int) -> range:
        return range(start, min(start + PIECE, len(self.source)))

    @torch.no_grad()
    def _write(self, rows: range) -> None:
        """Put the features of consecutive rows on the disk."""
        x0 = self.extractor.encode(self.source.images(rows, self.size))
        draws = [self.extractor.draw(x0, k, indices=rows) for k in range(self.extractor.draws)]
        for tap, array in self.arrays.items():
            value = torch.stack([draw[tap] for draw in draws], dim=1).cpu().numpy()
            with np.errstate(over="ignore"):
                block = np.ascontiguousarray(value, dtype=array.dtype)
            if not np.isfinite(block).all():
                raise FloatingPointError(
                    f"Features of the tap {tap!r} reach {np.abs(value).max():.3g}, too large for {array.dtype}. Use float32."
                )
            # Plain writes, not the map: of two machines that share a disk, each writes its own bytes, not whole pages.
            with open(_file(self.folder, tap), "r+b") as file:
                file.seek(array.offset + rows[0] * block[0].nbytes)
                file.write(block.tobytes())
                file.flush()
                os.fsync(file.fileno())


def _settings(extractor: FeatureExtractor, source: ImageSource, size: tuple[int, int], dtype: str) -> dict[str, Any]:
    return {
        "model": model_identity(extractor.denoiser.pipe),
        "data": {"name": source.name, "rows": len(source), "fingerprint": _fingerprint(source, size)},
        "taps": {tap: list(shape) for tap, shape in _shapes(extractor, size).items()},
        "t": list(extractor.t) if extractor.several else extractor.t[0],
        "noise": extractor.noise,
        "seed": extractor.seed,
        "pool": extractor.pool,
        "dtype": dtype,
        "size": list(size),
    }


def model_identity(pipe: Any) -> str:
    """Name of a pipeline's model, and a hash of some of its weights and its noise schedule: "digits:1f2e3d4c5b6a"."""
    record = origin(pipe)
    content = json.dumps({key: value for key, value in record.items() if key != "name"}, sort_keys=True)
    return f"{record['name']}:{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _fingerprint(source: ImageSource, size: tuple[int, int]) -> str:
    """A hash of the rows' names and labels, and of the pixels of some rows."""
    rows = sorted({i * (len(source) - 1) // max(1, _SAMPLED - 1) for i in range(_SAMPLED)})
    described = json.dumps([source.names, source.labels, source.groups]).encode()
    return hashlib.sha256(described + source.images(rows, size).numpy().tobytes()).hexdigest()[:12]


def _shapes(extractor: FeatureExtractor, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of one row and draw of each tap, pooled: (C, h, w), or (T, C, h, w) with several t."""
    infos = extractor.info(*size)
    levels = (len(extractor.t),) if extractor.several else ()
    return {info.name: (*levels, *extractor.pooled_shape(info.shape)) for info in infos}


def _prepare(folder: Path, settings: dict[str, Any], source: ImageSource, resume: bool) -> None:
    """Make the files, or refuse a folder whose features were made otherwise."""
    found = _read_record(folder)
    if found is None:
        prepare_folder(folder)
        for tap, shape in settings["taps"].items():
            np.lib.format.open_memmap(
                _file(folder, tap), mode="w+", dtype=settings["dtype"], shape=(len(source), _draws(settings), *shape)
            )
        record = {"settings": settings, "names": source.names, "labels": source.labels, "groups": source.groups}
        write_atomic(folder / RECORD, json.dumps(record).encode())
        return
    for key, wanted in settings.items():
        here = found["settings"].get(key)
        if here != wanted:
            raise ValueError(
                f"The features in {str(folder)!r} were made with {key} {_brief(here)}, but {_brief(wanted)} is "
                "wanted. Use another folder."
            )
    if not resume:
        raise ValueError(f"{str(folder)!r} already holds these features. Use --resume (resume=True) to go on with them.")


def _draws(settings: dict[str, Any]) -> int:
    return 1 if settings["noise"] == "fixed" else settings["noise"]


def _brief(value: Any) -> str:
    if isinstance(value, dict) and "fingerprint" in value:
        return f"{value['name']!r} ({value['rows']} rows, {value['fingerprint']})"
    return f"{', '.join(value)}" if isinstance(value, dict) else repr(value)


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        sound = _is_sound(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(f"{str(file)!r} is damaged. Remove the folder and make the features again.")
    return content


def _is_sound(content: dict[str, Any]) -> bool:
    settings = content["settings"]
    rows, taps = settings["data"]["rows"], settings["taps"]
    lists = [content["groups"], *(content[name] for name in ("names", "labels") if content[name] is not None)]
    whole = type(rows) is int and all(isinstance(values, list) and len(values) == rows for values in lists)
    shapes = all(isinstance(shape, list) and all(type(side) is int for side in shape) for shape in taps.values())
    return whole and shapes and all(Path(tap).name == tap for tap in taps) and type(_draws(settings)) is int


def _pieces(rows: int) -> set[int]:
    """First rows of the pieces."""
    return set(range(0, rows, PIECE))


def _finished(folder: Path) -> set[int]:
    return {start for note in folder.glob("done-*.json") for start in _noted(note)}


def _noted(note: Path) -> set[int]:
    """The pieces that a process has noted; none if the note is damaged, so that they are made again."""
    try:
        starts = json.loads(note.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    return {start for start in starts if type(start) is int} if isinstance(starts, list) else set()


def _open_array(folder: Path, tap: str, settings: dict[str, Any]) -> np.memmap:
    """The array of a tap as a memory map.

    Raises:
        ValueError: it is missing, truncated or damaged.
    """
    expected = (settings["data"]["rows"], _draws(settings), *settings["taps"][tap])
    try:
        array = np.load(_file(folder, tap), mmap_mode="r")
        sound = array.shape == expected and array.dtype == settings["dtype"]
    except Exception:  # the header of a damaged file is parsed as Python, which raises many things
        sound = False
    if not sound:
        raise ValueError(f"{str(_file(folder, tap))!r} is missing or damaged. Remove the folder and make the features again.")
    return array


def _file(folder: Path, tap: str) -> Path:
    return folder / f"{tap}.npy"
