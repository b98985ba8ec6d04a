"""A journal: results line by line as they come, so that nothing finished is lost, and an interrupted run can go on.

The file holds JSON lines: the settings of the run first, then one record for each result. Every process writes a file of its own
(`results.jsonl`, `results.1.jsonl`, ...); all of them are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends records, and gives back those of earlier runs with equal settings.

    Args:
        path: of the first process's file; its folder exists.
        settings: JSON values that decide the results.
        part: number of this process.

    Example:
        >>> journal = Journal(folder / "results.jsonl", {"model": "digits"})
        >>> done = journal.records()
        >>> journal.append({"image": "a.png", "label": "seven"})
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], part: int = 0) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self._own = path if part == 0 else path.with_name(f"{path.stem}.{part}{path.suffix}")

    def exists(self) -> bool:
        """Whether an earlier run left records."""
        return bool(self._files())

    def records(self) -> list[dict[str, Any]]:
        """The records of earlier runs, of all their processes.

        Raises:
            ValueError: a file that is no journal, or was made with other settings; names both.
        """
        return [record for file in self._files() for record in self._read(file)]

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
            OSError: the disk is full, or the folder has gone.
        """
        with open(self._own, "ab") as file:
            end = _whole(self._own)
            file.truncate(end)  # a line that a crash cut off
            lines = [record] if end else [{"settings": self.settings}, record]
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _files(self) -> list[Path]:
        parts = self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")
        numbered = [p for p in parts if p.name[len(self.path.stem) + 1 : -len(self.path.suffix)].isdecimal()]
        return [p for p in (self.path, *sorted(numbered)) if p.is_file() and p.stat().st_size]

    def _read(self, file: Path) -> list[dict[str, Any]]:
        content = file.read_bytes()[: _whole(file)].decode("utf-8", "replace")
        try:
            lines = [json.loads(line) for line in content.splitlines()]
        except (ValueError, RecursionError):
            lines = [None]
        if not all(isinstance(line, dict) for line in lines) or (lines and not isinstance(lines[0].get("settings"), dict)):
            raise ValueError(f"{str(file)!r} is no journal of genkit. Name another output.")
        if lines:
            self._require_equal(file, lines[0]["settings"])
        return lines[1:]

    def _require_equal(self, file: Path, theirs: dict[str, Any]) -> None:
        names = [name for name in {**theirs, **self.settings} if theirs.get(name) != self.settings.get(name)]
        if names:
            there, here = (", ".join(f"{name} {side.get(name)!r:.80}" for name in names) for side in (theirs, self.settings))
            raise ValueError(f"{str(file)!r} was made with {there}, but this run has {here}. Use the same, or another output.")


def _whole(file: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with open(file, "rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
