"""Features of all pictures of a source, shared out over processes and kept on the disk piece by piece.

A piece is 64 rows; its pictures go through the network together whatever the number of processes, so the features are the same. It
is kept under a hash of all that it depends on (weights, size, the pictures' bytes), whole or not at all, with a checksum: a damaged
file counts as missing. So what an interrupted run has finished is found by the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.files import cache_folder, write_atomic
from genkit.metrics.backbones import Backbone
from genkit.ranks import Ranks

PIECE = 64  # rows
_FORMAT = "1"


def read_features(
    backbone: Backbone,
    source: ImageSource,
    *,
    folder: Path | None = None,
    reuse: bool = True,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Features (N, D) of a source, float32.

    Args:
        folder: where pieces are kept; `genkit.files.cache_folder()` / features by default.
        reuse: take what is kept there already.
        ranks: processes that share the work, after `Ranks.join`.
        progress: called with the number of rows that this process has since the last call.

    Raises:
        ValueError: a picture that cannot be read.
        FloatingPointError: features that are not finite.

    Example:
        >>> read_features(load_backbone("judge"), open_source("digits-test")).shape
        torch.Size([1000, 128])
    """

    def run(rows: Sequence[int]) -> Tensor:
        return backbone(source.images(rows, backbone.size))

    return read(run, backbone.identity(), source, folder=folder, reuse=reuse, ranks=ranks, progress=progress)


def read(
    run: Callable[[Sequence[int]], Tensor],
    identity: str,
    source: ImageSource,
    *,
    folder: Path | None = None,
    reuse: bool = True,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What `run` gives for the rows of a source, (N, ...); `identity` says what else it depends on. Else as `read_features`."""
    ranks, folder = ranks or Ranks(), folder or cache_folder() / "features"
    mine: dict[int, Tensor] = {}
    for rows in ranks.share(_pieces(source)):
        file = _file(folder, identity, source, rows)
        value = _load(file, len(rows)) if reuse else None
        if value is None:
            value = run(rows).contiguous()
            if not value.isfinite().all():
                raise FloatingPointError(f"Features of {_named(source, rows)} are not finite. Use another network, or float32.")
            _keep(file, value)
        mine[rows[0]] = value
        if progress is not None:
            progress(len(rows))
    everything = {start: value for part in ranks.gather([mine]) for start, value in part.items()}
    return torch.cat([everything[start] for start in sorted(everything)])


def forget(identity: str, source: ImageSource, folder: Path | None = None) -> None:
    """Remove what `read` has kept."""
    for rows in _pieces(source):
        _file(folder or cache_folder() / "features", identity, source, rows).unlink(missing_ok=True)


def _pieces(source: ImageSource) -> list[range]:
    return [range(start, min(start + PIECE, len(source))) for start in range(0, len(source), PIECE)]


def _file(folder: Path, identity: str, source: ImageSource, rows: Sequence[int]) -> Path:
    if source.contents is None:
        raise ValueError(f"The pictures of {source.name!r} have no contents by which they are known again.")
    digest = hashlib.sha256(f"{_FORMAT} {identity}".encode())
    for row in rows:
        digest.update(hashlib.sha256(source.contents(row)).digest())
    key = digest.hexdigest()
    return folder / key[:2] / f"{key}.safetensors"


def _load(file: Path, rows: int) -> Tensor | None:
    """What a file keeps, or None if it is missing or damaged."""
    try:
        with safe_open(file, "pt") as content:
            value, checksum = content.get_tensor("features"), (content.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return value if len(value) == rows and checksum == _checksum(value) else None


def _keep(file: Path, value: Tensor) -> None:
    """Write a file; a folder that cannot be written costs no result."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"features": value}, {"sha256": _checksum(value)}))
    except OSError:
        pass


def _checksum(value: Tensor) -> str:
    return hashlib.sha256(value.numpy().tobytes()).hexdigest()


def _named(source: ImageSource, rows: Sequence[int]) -> str:
    return f"{source.names[rows[0]]!r} and others" if source.names else f"row {rows[0]} and others"
