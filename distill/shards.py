"""Clean latents on disk, in shards: files that are there whole or not at all.

A folder holds a record, `synth.json` or `encoded.json`: how its items were made, and how many of which shape each shard has; and

    shard-00000.safetensors     latents (n, c, h, w); seed (n,) int64 where a teacher made them; cond.NAME (n, ...) and null.NAME
                                (1, ...): encoded conditions, and the null condition
                                metadata: "prompts" and "labels" (JSON lists of n), "settings" and "rows" (what they belong to),
                                "paired" (the latents are a deterministic function of the seed's noise), "skipped" (JSON list)

A shard is the unit of work. Several processes share the shards of a folder, and an interrupted run goes on with those that are
missing; one that was truncated, or that belongs to other settings, counts as missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.files import prepare_folder, write_atomic
from genkit.ranks import Ranks

SYNTH, ENCODED = "synth.json", "encoded.json"
STORAGE = ("float16", "float32")
_FORMAT = 1

Content = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors of a shard, a row for each item, and its metadata."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a shard is to hold: items `rows` of the whole, each with latents of `shape` (c, h, w)."""

    rows: Sequence[int]
    shape: tuple[int, ...]


class Shard:
    """A shard that exists: its metadata, and its tensors on demand.

    Args:
        file: where it is.
        settings: identity of the settings that it must have been made with.

    Raises:
        ValueError: missing, truncated, damaged, or made with other settings; the message is only the reason.
    """

    def __init__(self, file: Path, settings: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.file = file
        try:
            self._handle = safe_open(file, framework="pt")
            self.metadata: dict[str, Any] = {key: json.loads(value) for key, value in (self._handle.metadata() or {}).items()}
            names = self._handle.keys()
            self.shapes = {name: tuple(self._handle.get_slice(name).get_shape()) for name in names}
        except FileNotFoundError:
            raise ValueError("it is missing") from None
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise ValueError(f"it is truncated or damaged: {error}") from error
        if self.metadata.get("settings") != settings:
            raise ValueError("it was made with other settings")
        sizes = {shape[0] for name, shape in self.shapes.items() if not name.startswith("null.")}
        sizes |= {len(self.metadata[key]) for key in ("prompts", "labels") if key in self.metadata}
        if "latents" not in self.shapes or len(sizes) != 1:
            raise ValueError("it is damaged: its parts have different numbers of items")
        self._tensors: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self.shapes["latents"][0]

    def read(self, name: str, rows: Sequence[int], *, keep: bool = False) -> Tensor:
        """Rows of a tensor as they are stored.

        Args:
            keep: hold the whole tensor in memory from now on.
        """
        if keep and name not in self._tensors:
            self._tensors[name] = self._handle.get_tensor(name)
        if name in self._tensors:
            return self._tensors[name][list(rows)]
        return self._handle.get_slice(name)[list(rows)]


def shard_file(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def identity(settings: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def fill(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    parts: Sequence[Part],
    make: Callable[[Part], Content],
    *,
    resume: bool,
    skipped: bool = False,
    ranks: Ranks,
    progress: Callable[[int], None],
) -> None:
    """Make the shards of a folder that are missing.

    Args:
        name: of the record, `SYNTH` or `ENCODED`.
        settings: JSON values that decide what the items are; "storage" among them.
        parts: what each shard holds.
        make: makes one; its latents are stored as "storage" says.
        resume: go on with a folder that has a record.
        skipped: shards that lack some of their items are good enough.
        ranks: processes that share the work, after `Ranks.join`.
        progress: called with the number of items that were there already.

    Raises:
        ValueError: a folder of other settings (the message names the difference), or of the same without `resume`.
        FloatingPointError: latents that are not finite as they are stored.
        OSError: the folder cannot be written, or the disk is or will be full; finished shards stay.
    """
    if ranks.leads:
        _prepare(folder, name, settings, parts, resume)
    ranks.wait()
    missing = []
    for number, part in ranks.share(list(enumerate(parts))):
        if _is_there(shard_file(folder, number), settings, part, skipped):
            progress(len(part.rows))
        else:
            missing.append((number, part))
    for number, part in missing:
        tensors, metadata = make(part)
        _write(shard_file(folder, number), tensors, metadata, settings, part)
    ranks.wait()


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a folder of latents: the settings, and "shards"; None if it has none.

    Raises:
        ValueError: a damaged record, or one of another version.
    """
    file = next((folder / name for name in (SYNTH, ENCODED) if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["space"].items()
        [(int(shard["items"]), tuple(shard["shape"])) for shard in record["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged. Remove the folder and make its data again.") from error
    if record.get("format") != _FORMAT:
        raise ValueError(
            f"{str(file)!r} has format {record.get('format')!r}, but this genkit reads {_FORMAT}. Make the data again."
        )
    return record


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """The settings in a record."""
    return {key: value for key, value in record.items() if key not in ("format", "shards")}


def difference(there: dict[str, Any], here: dict[str, Any], free: Sequence[str] = ()) -> str:
    """In words, what differs between two settings: "it has steps 50, but here it is steps 16"; empty if nothing does.

    Args:
        free: names of settings that may differ.
    """
    keys = [key for key in {**there, **here} if key not in free and there.get(key) != here.get(key)]
    if not keys:
        return ""
    listed = (", ".join(f"{key} {side.get(key)!r:.80}" for key in keys) for side in (there, here))
    return "it has {}, but here it is {}".format(*listed)


def _prepare(folder: Path, name: str, settings: dict[str, Any], parts: Sequence[Part], resume: bool) -> None:
    """Write the record, or refuse a folder whose items were made otherwise."""
    found = read_record(folder)
    if found is not None:
        differs = difference(settings_of(found), settings)
        if differs:
            raise ValueError(
                f"The data in {str(folder)!r} was made otherwise: {differs}. Use the same settings, or another folder."
            )
        if not resume:
            raise ValueError(f"{str(folder)!r} already holds this data. Use --resume (resume=True) to make what is missing.")
    prepare_folder(folder)
    absent = [part for number, part in enumerate(parts) if not shard_file(folder, number).exists()]
    _require_space(folder, absent, settings["storage"])
    shards = [{"items": len(part.rows), "shape": list(part.shape)} for part in parts]
    write_atomic(folder / name, json.dumps({"format": _FORMAT, **settings, "shards": shards}, indent=1).encode())


def _is_there(file: Path, settings: dict[str, Any], part: Part, skipped: bool) -> bool:
    """Whether a shard is whole and holds what it should."""
    try:
        shard = Shard(file, identity(settings))
    except ValueError:
        return False
    return shard.metadata.get("rows") == identity(list(part.rows)) and (skipped or len(shard) == len(part.rows))


def _require_space(folder: Path, parts: Sequence[Part], storage: str) -> None:
    needed = sum(len(part.rows) * math.prod(part.shape) for part in parts) * getattr(torch, storage).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The latents need {needed / 1e9:.2f} GB, but the disk of {str(folder)!r} has {free / 1e9:.2f} GB left. "
            "Make room, or use another folder."
        )


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], settings: dict[str, Any], part: Part) -> None:
    from safetensors.torch import save

    stored = getattr(torch, settings["storage"])
    # Integers (seeds, classes, masks of tokens) stay what they are.
    kept = {key: (value.to(stored) if value.is_floating_point() else value).cpu().contiguous() for key, value in tensors.items()}
    for key, value in kept.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            largest = tensors[key].abs().max().item()
            raise FloatingPointError(
                f"{key} of {file.name} reach {largest:.3g}, which is not finite in {settings['storage']}. Use --storage float32."
            )
    metadata = {**metadata, "settings": identity(settings), "rows": identity(list(part.rows))}
    try:
        write_atomic(file, save(kept, {key: json.dumps(value) for key, value in metadata.items()}))
    except OSError as error:
        raise OSError(
            f"{str(file)!r} cannot be written ({error.strerror}). Finished shards are kept: make room, and repeat with --resume."
        ) from error
