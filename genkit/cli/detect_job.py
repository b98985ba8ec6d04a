"""Carries out what `genkit detect` was asked."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.cli.common import Output, resolve_device
from genkit.cli.image_job import ROWS, ImageJob, Record
from genkit.data.coco import CocoData, read_coco
from genkit.data.pictures import picture_size
from genkit.files import prepare_folder, write_atomic
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from genkit.pipelines import LayoutInversionPipeline
    from genkit.pipelines.detection import Detections


class Job(ImageJob):
    """A run of `genkit detect`.

    Args:
        settings: of the pipeline, with "plan" as a dictionary; they go into the journal.
        reference: COCO annotations of the images, or None.
        least: score from which objects are reported.

    Raises:
        ValueError: a reference that lacks an image, or has two of its name.
    """

    def __init__(
        self, files: list[Path], settings: dict[str, Any], reference: Path | None, out: Path | None, least: float, ranks: Ranks,
        output: Output,
    ) -> None:  # fmt: skip
        self.out, self.least = out, least
        self.reference = None if reference is None else read_coco(reference)
        self.image_ids = _image_ids(files, self.reference, reference)
        if out is not None:
            prepare_folder(out)
        super().__init__(files, settings, None if out is None else out / "detections.jsonl", ranks, output)

    def work(self, files: list[Path], device: str, **how: Any) -> None:
        from genkit import zoo
        from genkit.attention import use_attention
        from genkit.console import progress
        from genkit.inversion.layout_search import LayoutSearch
        from genkit.pipelines import LayoutInversionPipeline, LayoutPriorPipeline
        from genkit.pipelines.detection import PLAN
        from genkit.runner import load
        from genkit.scoring import PairPlan

        read: list[Path] = []
        pictures = self.pictures(files, read)
        first = next(pictures, None)
        if first is None:
            return
        where, settings = resolve_device(device), self.settings
        pairs, search = settings["plan"]["count"], LayoutSearch(budget=settings["budget"])
        with progress(disable=not self.ranks.leads) as bar:
            task = bar.add_task(f"loading {Path(settings['model']).name}", total=len(files))
            host = load(
                settings["model"], dtype=settings["dtype"], device=where, allow_pickle=how["allow_pickle"], quiet=self.output.quiet
            )
            pipe = LayoutInversionPipeline.from_pipe(host)
            classes = pipe.denoiser.grounding(settings["labels"]).class_names
            name = settings["prior"]
            prior = None
            if name is not None:
                prior = LayoutPriorPipeline.from_pretrained(str(zoo.folder(name))).to(where)
            bar.update(task, description="detecting")

            def keep(pipe: LayoutInversionPipeline, index: int, found: Detections) -> None:
                self.keep(read[index], _record(read[index], found, pipe, classes))
                bar.advance(task)

            with use_attention(pipe, how["attn"]):
                pipe(
                    itertools.chain([first], pictures), labels=settings["labels"], prior=prior, beta=settings["beta"],
                    nms=settings["nms"],
                    search=dataclasses.replace(search, few=min(search.few, pairs), some=min(search.some, pairs)),
                    plan=PairPlan(**settings["plan"], span=PLAN.span), batch_size=how["batch_size"], callback=keep,
                )  # fmt: skip
            self.attention = pipe.attention

    def results(self) -> list[Record]:
        """What was found, as far as it is sure enough."""
        found = []
        for record in super().results():
            rows = [i for i, score in enumerate(record["scores"]) if score >= self.least]
            found.append(record | {name: [record[name][i] for i in rows] for name in ("labels", "boxes", "scores", "gains")})
        return found

    def figures(self) -> dict[str, Any]:
        """COCO's figures of what is finished; empty without a reference."""
        if self.reference is None or not self.records:
            return {}
        from genkit.metrics.detection import average_precision

        done = {self.image_ids[record["image"]] for record in self.results()}
        document = self.reference.document
        part = document | {
            "images": [image for image in document["images"] if image["id"] in done],
            "annotations": [entry for entry in document["annotations"] if entry["image_id"] in done],
        }
        return average_precision(part, self._coco())

    def write(self, document: dict[str, Any]) -> None:
        assert self.out is not None
        write_atomic(self.out / "detections.json", (json.dumps(document, indent=2) + "\n").encode())
        write_atomic(self.out / "coco.json", (json.dumps(self._coco()) + "\n").encode())
        self._draw(self.out)

    def rich(self) -> Any:
        from rich import table
        from rich.console import Group
        from rich.markup import escape

        records = self.results()
        grid = table.Table("image", "objects", box=None)
        grid.add_column("evaluations", justify="right")
        for record in records[: ROWS if self.out else None]:
            objects = (f"{label} {score:.2f}" for label, score in zip(record["labels"], record["scores"], strict=True))
            grid.add_row(escape(record["image"]), escape(", ".join(objects) or "nothing"), f"{record['evaluations']:,}")
        lines = []
        if self.out and len(records) > ROWS:
            lines.append(f"... and {len(records) - ROWS} more.")
        lines.append(f"{len(records)} of {len(self.files)} images.")
        if figures := self.figures():
            lines.append(", ".join(f"{name} {value:.3f}" for name, value in figures.items()) + ".")
        if self.out:
            lines.append(f"Written: {self.out}.")
        return Group(grid, escape("\n".join(lines)))

    def _coco(self) -> list[dict[str, Any]]:
        """COCO results; without a reference, images count from 1 in the order in which they were named, and classes from 1."""
        rows = []
        for record in self.results():
            for label, box, score in zip(record["labels"], record["boxes"], record["scores"], strict=True):
                category = self._category(label, record)
                if category is not None:
                    x0, y0, x1, y1 = box
                    bbox = [x0, y0, x1 - x0, y1 - y0]
                    rows.append(
                        {"image_id": self.image_ids[record["image"]], "category_id": category, "bbox": bbox, "score": score}
                    )
        return rows

    def _category(self, label: str, record: Record) -> int | None:
        """The id of a class; None where the reference does not have it."""
        return record["classes"].index(label) + 1 if self.reference is None else self.reference.categories.get(label)

    def _draw(self, folder: Path) -> None:
        """Each image with its boxes."""
        from genkit.data.pictures import read_picture
        from genkit.images import save_png, with_boxes

        names = _unique_names([Path(record["image"]) for record in self.results()])
        for record, name in zip(self.results(), names, strict=True):
            labels = [f"{label} {score:.2f}" for label, score in zip(record["labels"], record["scores"], strict=True)]
            save_png(with_boxes(read_picture(Path(record["image"]))[0], record["boxes"], labels), folder / name)


def _record(file: Path, found: Detections, pipe: LayoutInversionPipeline, classes: list[str]) -> Record:
    width, height = picture_size(file)[::-1]
    return {
        "size": [width, height],
        "classes": classes,
        "labels": list(found.layout.labels),
        "boxes": [_in_file(box, width, height, pipe.picture_size) for box in found.layout.boxes],
        "scores": [round(score, 6) for score in found.scores],
        "gains": [round(gain, 4) for gain in found.gains],
        "evaluations": found.evaluations,
    }


def _in_file(box: Any, width: int, height: int, shown: tuple[int, int]) -> list[float]:
    """A box in pixels of a file, of which the model saw the largest centre part of its own shape (`fit_picture`)."""
    scale = max(shown[0] / width, shown[1] / height)
    sides = shown[0] / scale, shown[1] / scale
    left, top = (width - sides[0]) / 2, (height - sides[1]) / 2
    x0, y0, x1, y1 = box
    return [round(v, 3) for v in (left + x0 * sides[0], top + y0 * sides[1], left + x1 * sides[0], top + y1 * sides[1])]


def _image_ids(files: list[Path], data: CocoData | None, file: Path | None) -> dict[str, int]:
    """The id of each image."""
    if data is None:
        return {str(path): number for number, path in enumerate(files, 1)}
    by_name: dict[str, list[int]] = {}
    for image in data.images:
        by_name.setdefault(Path(image.file_name).name, []).append(image.id)
    found = {}
    for path in files:
        ids = by_name.get(path.name, [])
        if len(ids) != 1:
            problem = "lacks" if not ids else "has several images called"
            raise ValueError(f"The reference {str(file)!r} {problem} {path.name!r}. Give the annotations of these images.")
        found[str(path)] = ids[0]
    return found


def _unique_names(files: list[Path]) -> list[str]:
    """A name for the picture of each image: its own, with a number where two are the same."""
    names: list[str] = []
    for file in files:
        name, number = f"{file.stem}.png", 1
        while name in names:
            number += 1
            name = f"{file.stem}-{number}.png"
        names.append(name)
    return names
