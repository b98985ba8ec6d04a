"""Carries out what `genkit classify` was asked."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli.common import Output, resolve_device
from genkit.cli.image_job import ROWS, ImageJob, Record
from genkit.files import prepare_folder, write_atomic
from genkit.metrics.accuracy import accuracy, class_balanced_accuracy
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from genkit.pipelines import Classification


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


class Job(ImageJob):
    """A run of `genkit classify`.

    Args:
        settings: of the pipeline's call, with "model", "dtype", and "plan" as a dictionary; they go into the journal.
        truth: true label of each file, for the accuracy.
    """

    def __init__(
        self, files: list[Path], labels: list[str], settings: dict[str, Any], truth: dict[Path, str] | None,
        table: Table | None, ranks: Ranks, output: Output,
    ) -> None:  # fmt: skip
        super().__init__(files, settings, None if table is None else table.journal, ranks, output)
        self.labels, self.truth, self.table = labels, truth, table

    def work(self, files: list[Path], device: str, **how: Any) -> None:
        from genkit.attention import use_attention
        from genkit.console import progress
        from genkit.pipelines import DiffusionClassifierPipeline
        from genkit.runner import load
        from genkit.scoring import PairPlan

        arguments = {key: value for key, value in self.settings.items() if key not in ("model", "dtype")}
        arguments["plan"] = PairPlan(**arguments["plan"])
        read: list[Path] = []
        hits: list[bool] = []
        pictures = self.pictures(files, read)
        first = next(pictures, None)
        if first is None:
            return
        with progress(disable=not self.ranks.leads) as bar:
            task = bar.add_task(f"loading {Path(self.settings['model']).name}", total=len(files))
            host = load(
                self.settings["model"], dtype=self.settings["dtype"], device=resolve_device(device),
                allow_pickle=how["allow_pickle"], quiet=self.output.quiet,
            )  # fmt: skip
            bar.update(task, description="classifying")

            def keep(pipe: DiffusionClassifierPipeline, index: int, result: Classification) -> None:
                self.keep(read[index], _record(result))
                if self.truth is not None:
                    hits.append(self.truth[read[index]] == result.label)
                    bar.update(task, description=f"accuracy {sum(hits) / len(hits):.1%}")
                bar.advance(task)

            pipe = DiffusionClassifierPipeline.from_pipe(host)
            with use_attention(pipe, how["attn"]):
                pipe(itertools.chain([first], pictures), batch_size=how["batch_size"], fold=how["fold"], callback=keep, **arguments)
            self.attention = pipe.attention

    def results(self) -> list[Record]:
        """The finished images in the order in which they were named, with their true labels."""
        truth = {} if self.truth is None else {str(file): {"truth": label} for file, label in self.truth.items()}
        return [record | truth.get(record["image"], {}) for record in super().results()]

    def figures(self) -> dict[str, Any]:
        """The accuracy of what is finished; empty without true labels."""
        if self.truth is None or not self.records:
            return {}
        predicted, true = zip(*((record["label"], record["truth"]) for record in self.results()), strict=True)
        plain, balanced = accuracy(predicted, true), class_balanced_accuracy(predicted, true)
        return {
            "accuracy": plain.value, "accuracy_interval": [plain.low, plain.high], "class_balanced_accuracy": balanced.value,
            "count": plain.count,
        }  # fmt: skip

    def write(self, document: dict[str, Any]) -> None:
        assert self.table is not None
        self.table.write(document)

    def rich(self) -> Any:
        """The table for people, and the summary."""
        from rich import table
        from rich.console import Group
        from rich.markup import escape

        records = self.results()
        grid = table.Table("image", "label", box=None)
        for name in ("probability", "evaluations", "error bound"):
            grid.add_column(name, justify="right")
        for record in records[: ROWS if self.table else None]:
            right = record["label"] == record.get("truth", record["label"])
            label = escape(record["label"]) if right else f"[red]{escape(record['label'])}[/red] ({escape(record['truth'])})"
            bound = f"{record['error_bound']:.2g}"
            grid.add_row(escape(record["image"]), label, f"{record['probability']:.3f}", str(record["evaluations"]), bound)
        lines = []
        if self.table and len(records) > ROWS:
            lines.append(f"... and {len(records) - ROWS} more.")
        if records:
            mean = sum(record["evaluations"] for record in records) / len(records)
            lines.append(f"{len(records)} of {len(self.files)} images, {mean:.0f} network evaluations each.")
        if figures := self.figures():
            low, high = figures["accuracy_interval"]
            lines.append(
                f"Accuracy {figures['accuracy']:.1%} ({low:.1%} to {high:.1%}), "
                f"class-balanced {figures['class_balanced_accuracy']:.1%}."
            )
        if self.table:
            lines.append(f"Written: {', '.join(map(str, self.table.files))}.")
        return Group(grid, escape("\n".join(lines)))


def _record(result: Classification) -> Record:
    return {
        "label": result.label,
        "probability": result.probabilities[result.label],
        # JSON has no infinity.
        "scores": {label: score if math.isfinite(score) else None for label, score in result.scores.items()},
        "evaluations": result.evaluations,
        "error_bound": result.error_bound,
    }
