"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash: temporary name, fsync, rename.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    # In the same folder, since a rename is atomic within one file system only; with the process, since several may write.
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shorten_log(file: Path, last: int, key: str = "step") -> None:
    """Drop the lines of a log (JSON, one object a line) that come after a step: an older run's, or ones that will be written again.

    A line that a kill cut short goes too, and one that cannot be read, as a crash of the machine leaves them. A missing file stays
    missing.
    """

    def kept(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)[key] <= last
        except (ValueError, KeyError, TypeError):
            return False

    if file.exists():
        write_atomic(file, b"".join(line for line in file.read_bytes().splitlines(keepends=True) if kept(line)))


def prepare_folder(folder: Path) -> None:
    """Create an output folder if needed and try whether it can be written, before hours are spent on its contents.

    Raises:
        OSError: it is or lies below a file, or cannot be written.
    """
    probe = folder / ".genkit-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(probe, b"")
        probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"The output path {str(folder)!r} is or lies below a file. Name a folder.") from None
    except OSError as error:
        raise OSError(f"The output folder {str(folder)!r} cannot be written ({error.strerror}). Name another.") from error


def cache_folder() -> Path:
    """The user's folder for what can be made again: GENKIT_CACHE, or `genkit` in the system's cache folder. It may be missing."""
    if own := os.environ.get("GENKIT_CACHE"):
        return Path(own).expanduser()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(base).expanduser() / "genkit"


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        ValueError: it is no TOML.
        OSError: it cannot be read.
    """
    import tomllib

    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no TOML ({error}). Repair it.") from error
