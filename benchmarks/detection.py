"""Detection by inversion of `scenes`, which was never trained to detect: average precision on held-out scenes, by evaluations.

    python benchmarks/detection.py [--model scenes] [--prior scenes-prior] [--detector FOLDER] [--count 200] [--only ROW]
        [--part I/N] [--out benchmarks/results/detection.json] [--picture FILE]

    mixed       200 scenes of test digits as `genkit.data.scenes` draws them, every fifth crowded
    crowded     200 scenes of 4 or 5 digits whose boxes may overlap, with the prior of layouts and without
    cheaper     the mixed ones with fewer pairs and steps: accuracy against evaluations
    baseline    FCOS, trained to detect on the scenes that the model was trained to draw, see benchmarks/detector.py

COCO's figures, by pycocotools. Seconds are CPU time of one thread on a CPU. Each scene is kept in a file beside --out as soon as it
is done; processes with --part 0/2 and 1/2 share the work, and the last run prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from turbo import fingerprint

from genkit import zoo
from genkit.data import scenes
from genkit.data.coco import CocoImage, annotation_document, pixels
from genkit.files import write_atomic
from genkit.images import contact_sheet, save_png, with_boxes
from genkit.inversion.layout_search import LayoutSearch
from genkit.journal import Journal
from genkit.measuring import seconds
from genkit.metrics.detection import average_precision
from genkit.pipelines import LayoutInversionPipeline, LayoutPriorPipeline
from genkit.pipelines.detection import PLAN

DRAWS = 200  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    kind: str = "mixed"
    split: str = "test"
    prior: bool = True
    search: LayoutSearch = dataclasses.field(default_factory=LayoutSearch)
    pairs: int = PLAN.count


CASES = {
    "mixed": Case(),
    "mixed, no prior": Case(prior=False),
    "crowded": Case("crowded"),
    "crowded, no prior": Case("crowded", prior=False),
    "mixed, at most 2,000": Case(search=LayoutSearch(budget=2000)),
    "mixed, half the pairs": Case(search=LayoutSearch(few=2, some=6), pairs=12),
    "mixed, half the pairs, no second look": Case(search=LayoutSearch(few=2, some=6, patience=1, anew=0), pairs=12),
}


def settings(case: Case, model: str) -> dict[str, Any]:
    """What decides the results, for the journal."""
    return {"model": fingerprint(model), **dataclasses.asdict(case)}


def run(case: Case, name: str, pipe: LayoutInversionPipeline, prior: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of all scenes that are done; does those of this part that are missing."""
    index, parts = options.part
    folder = options.out.parent / "detection"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / f"{name.replace(' ', '-').replace(',', '')}.jsonl", settings(case, options.model), index)
    records = {record["scene"]: record for record in journal.records()}
    batch = scenes.draw(case.split, options.count, kind=case.kind)
    plan = dataclasses.replace(PLAN, count=case.pairs)
    for i in range(index, options.count, parts):
        if i in records:
            continue
        found: list[Any] = []

        def detect(image: Tensor = batch.images[i], found: list[Any] = found) -> None:
            found += pipe(image, prior=prior if case.prior else None, search=case.search, plan=plan).detections

        time = seconds(detect)
        labels = [scenes.CLASSES.index(label) for label in found[0].layout.labels]
        record = {
            "scene": i, "labels": labels, "boxes": [list(box) for box in found[0].layout.boxes], "scores": found[0].scores,
            "gains": found[0].gains, "evaluations": found[0].evaluations, "seconds": time,
        }  # fmt: skip
        journal.append(record)
        records[i] = record
    return [records[i] for i in sorted(records) if i < options.count]


def figures(case: Case, records: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """COCO's figures with 95 % intervals (bootstrap over the scenes), and the cost of a scene."""
    images = scenes.coco_images(scenes.draw(case.split, count, kind=case.kind))
    found: dict[str, Any] = _precision(images, records)
    rng = np.random.default_rng(0)
    again = [_precision(images, [records[i] for i in rng.integers(len(records), size=len(records))]) for _ in range(DRAWS)]
    for name in ("AP50", "AP"):
        low, high = np.quantile([draw[name] for draw in again], (0.025, 0.975)).tolist()
        found |= {f"{name}_low": low, f"{name}_high": high}
    for name in ("evaluations", "seconds"):
        found[name] = statistics.mean(record[name] for record in records)
    return found | {"most_seconds": max(record["seconds"] for record in records), "scenes": len(records)}


def _precision(images: list[CocoImage], records: list[dict[str, Any]]) -> dict[str, float]:
    """Of some scenes; a scene may be there several times."""
    rows = [
        {"image_id": place, "category_id": label + 1, "bbox": pixels(box, scenes.SIZE, scenes.SIZE), "score": score}
        for place, record in enumerate(records)
        for label, box, score in zip(record["labels"], record["boxes"], record["scores"], strict=True)
    ]
    seen = [dataclasses.replace(images[record["scene"]], id=place) for place, record in enumerate(records)]
    return average_precision(annotation_document(seen, scenes.CLASSES), rows)


def draw(case: Case, records: list[dict[str, Any]], file: Path, count: int = 16) -> None:
    """Scenes with what was found."""
    batch = scenes.draw(case.split, count, kind=case.kind)
    drawn = []
    for record in records[:count]:
        picture = to_pil_image((batch.images[record["scene"]] / 2 + 0.5).clamp(0, 1))
        boxes = [[side * scenes.SIZE for side in box] for box in record["boxes"]]
        drawn.append(with_boxes(picture, boxes, [scenes.CLASSES[label] for label in record["labels"]], side=3 * scenes.SIZE))
    save_png(contact_sheet([drawn[k : k + 8] for k in range(0, len(drawn), 8)], [""] * -(-len(drawn) // 8), [""] * 8), file)


def main() -> None:
    """Measure what is missing, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--prior", default="scenes-prior")
    parser.add_argument("--detector", type=Path, help="folder of benchmarks/detector.py")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", action="append", choices=list(CASES), help="a row; may be given several times")
    parser.add_argument("--part", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/detection.json"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    pipe = LayoutInversionPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    prior = LayoutPriorPipeline.from_pretrained(zoo.path(options.prior) if options.prior in zoo.names() else options.prior)
    document: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    document["machine"] = {
        "device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__, "python": platform.python_version()
    }  # fmt: skip
    for name, case in CASES.items():
        if options.only is None or name in options.only:
            records = run(case, name, pipe, prior, options)
            document["rows"][name] = figures(case, records, options.count)
            if options.picture is not None and name == "mixed":
                draw(case, records, options.picture)
    if options.detector is not None:
        document["baseline"] = json.loads((options.detector / "figures.json").read_text())
    write_atomic(options.out, (json.dumps(document, indent=2) + "\n").encode())
    columns = ("AP50", "AP", "AP75", "evaluations", "seconds", "scenes")
    table = Table("", *columns, box=None)
    for name, row in document["rows"].items():
        table.add_row(name, *(f"{row[column]:.4g}" for column in columns))
    for kind in ("mixed", "crowded") if "baseline" in document else ():
        row = document["baseline"][kind]
        table.add_row(f"baseline, {kind}", *(f"{row[column]:.4g}" for column in columns[:3]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
