"""What commands over many images share: this process's part of them, the journal, what failed, the merged results, the report."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from genkit.cli.common import BAD_INPUT, INTERRUPTED, PARTLY, Output
from genkit.data.pictures import read_picture
from genkit.journal import Journal
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from PIL import Image

ROWS = 20  # of the printed table, where a file has all of it
Record = dict[str, Any]


class ImageJob(ABC):
    """A run of a command over images.

    Args:
        files: all of them, of all processes.
        settings: what decides the results, as JSON values; they go into the journal.
        journal: its file, or None to keep nothing.

    Attributes:
        records: results by image, each with "image" and the "digest" of the file.
        failed: errors by image. `notes`: images by what is to be said of them.
        attention: the account of this process.
    """

    def __init__(self, files: list[Path], settings: dict[str, Any], journal: Path | None, ranks: Ranks, output: Output) -> None:
        self.files, self.settings, self.ranks, self.output = files, settings, ranks, output
        self.journal = None if journal is None else Journal(journal, settings, ranks.index)
        self.records: dict[str, Record] = {}
        self.failed: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {}
        self.attention: dict[str, Any] | None = None
        self.began = time.perf_counter()

    @abstractmethod
    def work(self, files: list[Path], device: str, **how: Any) -> None:
        """Do some images, each with `keep` as soon as it is done."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """What is known of the results as a whole."""

    @abstractmethod
    def write(self, document: dict[str, Any]) -> None:
        """Write the files of --out."""

    @abstractmethod
    def rich(self) -> Any:
        """The table for people, and the summary."""

    def run(self, *, device: str, resume: bool, **how: Any) -> None:
        """Do what is missing, meet the other processes, report; `how` goes to `work`.

        Raises:
            ValueError: a journal that was not asked for, or was made with other settings.
            typer.Exit: some images failed, or the run was interrupted.
        """
        if self.journal is not None and self.journal.exists() and not resume:
            raise ValueError(f"{str(self.journal.path)!r} holds results. Add --resume to go on with them, or name another --out.")
        try:
            own = self.ranks.join(cpu=device == "cpu")
            mine = self._unfinished(self.ranks.share(self.files))
            self.ranks.wait()  # nobody writes a journal while another reads it
            if mine:
                self.work(mine, own or device, **how)
            self._merge()
        except KeyboardInterrupt:
            hint = "Repeat with --resume to finish." if self.journal else "These are printed; --out would have kept them."
            self.output.note(f"Interrupted after {len(self.records)} of {len(self.files)} images. {hint}")
            self.output.result({**self.document(), "interrupted": True}, "" if self.journal else self.rich())
            raise typer.Exit(INTERRUPTED) from None
        finally:
            self.ranks.leave()
        self._report()

    def keep(self, file: Path, record: Record) -> None:
        """A finished image; it is in the journal when this returns."""
        record = {"image": str(file), **record, "digest": _digest(file)}
        self.records[str(file)] = record
        if self.journal is not None:
            self.journal.append(record)

    def pictures(self, files: list[Path], read: list[Path]) -> Iterator[Image.Image]:
        """The pictures that can be read; `read` gets their files."""
        for file in files:
            try:
                picture, notes = read_picture(file)
            except ValueError as error:
                self.failed[str(file)] = str(error)
                continue
            for note in notes:
                self.notes.setdefault(note, []).append(str(file))
            read.append(file)
            yield picture

    def results(self) -> list[Record]:
        """The finished images in the order in which they were named."""
        done = [self.records[str(file)] for file in self.files if str(file) in self.records]
        return [{key: value for key, value in record.items() if key != "digest"} for record in done]

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        failed = [{"image": image, "error": error} for image, error in self.failed.items()]
        return {
            "results": self.results(), "failed": failed, **self.figures(), "attention": self.attention,
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip

    def _unfinished(self, files: list[Path]) -> list[Path]:
        """The files that the journal does not know, or knows with another content."""
        known = {record.get("image"): record for record in (self.journal.records() if self.journal else [])}
        for file in files:
            record = known.get(str(file))
            if record is not None and file.is_file() and record.get("digest") == _digest(file):
                self.records[str(file)] = record
        return [file for file in files if str(file) not in self.records]

    def _merge(self) -> None:
        """Everything that the other processes have, too."""
        found = self.ranks.gather([(self.records, self.failed, self.notes)])
        for records, failed, notes in found:
            self.records |= records
            self.failed |= failed
            for note, files in notes.items():
                self.notes[note] = sorted({*self.notes.get(note, []), *files})

    def _report(self) -> None:
        if self.ranks.leads:
            for error in self.failed.values():
                typer.echo(f"Error: {error}", err=True)
            for note, files in self.notes.items():
                self.output.note(f"{files[0]!r} {note}" + (f" ({len(files)} such images)." if len(files) > 1 else "."))
            document = self.document()
            if self.journal is not None and self.records:
                self.write(document)
            self.output.result(document, self.rich())
        if self.failed:
            raise typer.Exit(PARTLY if self.records else BAD_INPUT)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
