"""Carries out what `genkit classify` was asked: this process's share of the images, the journal, the merged table, the report."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from genkit.cli.common import BAD_INPUT, INTERRUPTED, PARTLY, Output, resolve_device
from genkit.data.pictures import read_picture
from genkit.files import prepare_folder, write_atomic
from genkit.journal import Journal
from genkit.metrics.accuracy import accuracy, class_balanced_accuracy
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from PIL import Image

    from genkit.pipelines import Classification

_ROWS = 20  # of the printed table, where a file has all of it
Record = dict[str, Any]


def truths(files: Sequence[Path], labels: Sequence[str], wanted: bool | None) -> dict[Path, str] | None:
    """The true label of each file, which is the name of its folder; None if folders are no labels or accuracy is not wanted.

    Raises:
        ValueError: accuracy is wanted, but some folder is no label.
    """
    if wanted is False:
        return None
    found = {file: file.resolve().parent.name for file in files}
    wrong = next((file for file, name in found.items() if name not in labels), None)
    if wrong is None:
        return found
    if wanted:
        raise ValueError(
            f"Accuracy needs folders that are named after labels, but {str(wrong)!r} is in {found[wrong]!r}. "
            f"The labels are {', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}."
        )
    return None


class Table:
    """The files of --out.

    Args:
        out: FILE.csv, FILE.json, or a folder, which gets results.csv and results.json.

    Raises:
        ValueError: another suffix.
        OSError: the folder cannot be written.
    """

    def __init__(self, out: Path, labels: list[str]) -> None:
        self.labels = labels
        if out.suffix in (".csv", ".json") and not out.is_dir():
            self.files = [out]
        elif out.suffix == "" or out.is_dir():
            self.files = [out / "results.csv", out / "results.json"]
        else:
            raise ValueError(f"--out {str(out)!r} is neither FILE.csv nor FILE.json, nor a folder.")
        self.journal = self.files[0].with_suffix(".jsonl")
        prepare_folder(self.journal.parent)

    def write(self, document: dict[str, Any]) -> None:
        """Write the results, each file whole or not at all."""
        for file in self.files:
            write_atomic(file, self._csv(document) if file.suffix == ".csv" else (json.dumps(document, indent=2) + "\n").encode())

    def _csv(self, document: dict[str, Any]) -> bytes:
        """A row for each image: its label, and then the score of each label, empty where there is none."""
        columns = ["image", "truth", "label", "probability", "evaluations", "error_bound"]
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns + [f"score of {label}" for label in self.labels])
        for record in document["results"]:
            writer.writerow([record.get(name, "") for name in columns] + [record["scores"][label] for label in self.labels])
        return text.getvalue().encode()


class Job:
    """A run of `genkit classify`.

    Args:
        settings: of the pipeline's call, with "model", "dtype", and "plan" as a dictionary; they go into the journal.
        truth: true label of each file, for the accuracy.
    """

    def __init__(
        self, files: list[Path], labels: list[str], settings: dict[str, Any], truth: dict[Path, str] | None,
        table: Table | None, ranks: Ranks, output: Output,
    ) -> None:  # fmt: skip
        self.files, self.labels, self.settings, self.truth = files, labels, settings, truth
        self.table, self.ranks, self.output = table, ranks, output
        self.journal = None if table is None else Journal(table.journal, settings, ranks.index)
        self.records: dict[str, Record] = {}
        self.failed: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {}
        self.attention: dict[str, Any] | None = None
        self.began = time.perf_counter()

    def run(self, *, device: str, attn: str = "auto", batch_size: int, fold: bool, allow_pickle: bool, resume: bool) -> None:
        """Classify what is missing, meet the other processes, report.

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
                self._classify(mine, own or device, attn, batch_size, fold, allow_pickle)
            self._merge()
        except KeyboardInterrupt:
            hint = "Repeat with --resume to finish." if self.table else "These are printed; --out would have kept them."
            self.output.note(f"Interrupted after {len(self.records)} of {len(self.files)} images. {hint}")
            self.output.result({**self._document(), "interrupted": True}, "" if self.table else self._rich())
            raise typer.Exit(INTERRUPTED) from None
        finally:
            self.ranks.leave()
        self._report()

    def _unfinished(self, files: list[Path]) -> list[Path]:
        """The files that the journal does not know, or knows with another content."""
        known = {record.get("image"): record for record in (self.journal.records() if self.journal else [])}
        for file in files:
            record = known.get(str(file))
            if record is not None and file.is_file() and record.get("digest") == _digest(file):
                self.records[str(file)] = record
        return [file for file in files if str(file) not in self.records]

    def _classify(self, files: list[Path], device: str, attn: str, batch_size: int, fold: bool, allow_pickle: bool) -> None:
        from genkit.attention import use_attention
        from genkit.console import progress
        from genkit.pipelines import DiffusionClassifierPipeline
        from genkit.runner import load
        from genkit.scoring import PairPlan

        arguments = {key: value for key, value in self.settings.items() if key not in ("model", "dtype")}
        arguments["plan"] = PairPlan(**arguments["plan"])
        read: list[Path] = []
        hits: list[bool] = []
        pictures = self._pictures(files, read)
        first = next(pictures, None)
        if first is None:
            return
        with progress(disable=not self.ranks.leads) as bar:
            task = bar.add_task(f"loading {Path(self.settings['model']).name}", total=len(files))
            host = load(
                self.settings["model"], dtype=self.settings["dtype"], device=resolve_device(device), allow_pickle=allow_pickle,
                quiet=self.output.quiet,
            )  # fmt: skip
            bar.update(task, description="classifying")

            def keep(pipe: DiffusionClassifierPipeline, index: int, result: Classification) -> None:
                record = self._record(read[index], result)
                self.records[record["image"]] = record
                if self.journal is not None:
                    self.journal.append(record)
                if self.truth is not None:
                    hits.append(self.truth[read[index]] == result.label)
                    bar.update(task, description=f"accuracy {sum(hits) / len(hits):.1%}")
                bar.advance(task)

            pipe = DiffusionClassifierPipeline.from_pipe(host)
            with use_attention(pipe, attn):
                pipe(itertools.chain([first], pictures), batch_size=batch_size, fold=fold, callback=keep, **arguments)
            self.attention = pipe.attention

    def _pictures(self, files: list[Path], read: list[Path]) -> Iterator[Image.Image]:
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

    def _record(self, file: Path, result: Classification) -> Record:
        return {
            "image": str(file),
            "label": result.label,
            "probability": result.probabilities[result.label],
            # JSON has no infinity.
            "scores": {label: score if math.isfinite(score) else None for label, score in result.scores.items()},
            "evaluations": result.evaluations,
            "error_bound": result.error_bound,
            "digest": _digest(file),
        }

    def _merge(self) -> None:
        """Everything that the other processes have, too."""
        found = self.ranks.gather([(self.records, self.failed, self.notes)])
        for records, failed, notes in found:
            self.records |= records
            self.failed |= failed
            for note, files in notes.items():
                self.notes[note] = sorted({*self.notes.get(note, []), *files})

    def _results(self) -> list[Record]:
        """The finished images in the order in which they were named, with their true labels."""
        done = [file for file in self.files if str(file) in self.records]
        truth = {} if self.truth is None else {file: {"truth": self.truth[file]} for file in done}
        return [
            {key: value for key, value in self.records[str(file)].items() if key != "digest"} | truth.get(file, {}) for file in done
        ]

    def _accuracy(self) -> dict[str, Any]:
        """Figures of what is finished; empty without true labels."""
        if self.truth is None or not self.records:
            return {}
        predicted, true = zip(*((record["label"], record["truth"]) for record in self._results()), strict=True)
        plain, balanced = accuracy(predicted, true), class_balanced_accuracy(predicted, true)
        return {
            "accuracy": plain.value, "accuracy_interval": [plain.low, plain.high], "class_balanced_accuracy": balanced.value,
            "count": plain.count,
        }  # fmt: skip

    def _document(self) -> dict[str, Any]:
        failed = [{"image": image, "error": error} for image, error in self.failed.items()]
        return {
            "results": self._results(), "failed": failed, **self._accuracy(), "attention": self.attention,
            "seconds": time.perf_counter() - self.began,
        }  # fmt: skip

    def _report(self) -> None:
        if self.ranks.leads:
            for error in self.failed.values():
                typer.echo(f"Error: {error}", err=True)
            for note, files in self.notes.items():
                self.output.note(f"{files[0]!r} {note}" + (f" ({len(files)} such images)." if len(files) > 1 else "."))
            document = self._document()
            if self.table is not None and self.records:
                self.table.write(document)
            self.output.result(document, self._rich())
        if self.failed:
            raise typer.Exit(PARTLY if self.records else BAD_INPUT)

    def _rich(self) -> Any:
        """The table for people, and the summary."""
        from rich import table
        from rich.console import Group
        from rich.markup import escape

        records = self._results()
        grid = table.Table("image", "label", box=None)
        for name in ("probability", "evaluations", "error bound"):
            grid.add_column(name, justify="right")
        for record in records[: _ROWS if self.table else None]:
            right = record["label"] == record.get("truth", record["label"])
            label = escape(record["label"]) if right else f"[red]{escape(record['label'])}[/red] ({escape(record['truth'])})"
            bound = f"{record['error_bound']:.2g}"
            grid.add_row(escape(record["image"]), label, f"{record['probability']:.3f}", str(record["evaluations"]), bound)
        lines = []
        if self.table and len(records) > _ROWS:
            lines.append(f"... and {len(records) - _ROWS} more.")
        if records:
            mean = sum(record["evaluations"] for record in records) / len(records)
            lines.append(f"{len(records)} of {len(self.files)} images, {mean:.0f} network evaluations each.")
        if figures := self._accuracy():
            low, high = figures["accuracy_interval"]
            lines.append(
                f"Accuracy {figures['accuracy']:.1%} ({low:.1%} to {high:.1%}), "
                f"class-balanced {figures['class_balanced_accuracy']:.1%}."
            )
        if self.table:
            lines.append(f"Written: {', '.join(map(str, self.table.files))}.")
        return Group(grid, escape("\n".join(lines)))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
