"""Arrays of `.npy` and `.npz` files that may come from anyone: nothing is unpickled, no more memory is taken than the bytes say.

numpy's own reader allocates what a header claims, and unpacks what an archive holds, whatever the file's size.
"""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def read_npy(file: Path) -> np.ndarray:
    """The array of a `.npy` file, which the caller found small enough to be read.

    Raises:
        ValueError: no such array: damaged, truncated, or a pickle. The message is only the reason.
        OSError: it cannot be read.
    """
    return parse_npy(file.read_bytes())


def read_npz(file: Path, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name.

    Args:
        most_bytes: of the arrays together, unpacked.

    Raises:
        ValueError: as of `read_npy`, or more than `most_bytes`.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > most_bytes:
                raise ValueError(f"unpacked it has more than {most_bytes >> 20} MiB")
            # An archive may lie about its sizes: no more is unpacked than it admits to.
            contents = {entry.filename.removesuffix(".npy"): archive.open(entry).read(entry.file_size) for entry in entries}
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever damage makes the unpacker raise
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return {name: parse_npy(content) for name, content in contents.items()}


def parse_npy(content: bytes) -> np.ndarray:
    """The array of a `.npy` file's bytes.

    Raises:
        ValueError: see `read_npy`.
    """
    stream = io.BytesIO(content)
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it is a pickle")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or count * dtype.itemsize > len(content) - stream.tell():
        raise ValueError(f"it is truncated or damaged: there is no room in it for {shape} of {dtype}")
    flat = np.frombuffer(content, dtype, count, stream.tell()) if count else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran else "C").copy()


def texts_of(array: np.ndarray) -> list[str]:
    """The texts of an array (N,) of them.

    Raises:
        ValueError: they are none, or hold what is no character.
    """
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"texts were expected, not {array.shape} of {array.dtype}")
    try:
        return array.tolist()
    except (ValueError, SystemError) as error:
        raise ValueError("a text holds a number that is no character") from error


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype of a `.npy` file; the stream is then at its numbers.

    Raises:
        ValueError: no such file, or a damaged header.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)
    except Exception as error:  # its header is parsed as Python, which raises many things
        raise ValueError(f"it is damaged, or no .npy file ({error!s:.100})") from error
