"""A few-step student of `digits` beside its teacher: quality by steps, and seconds for a picture.

    python benchmarks/turbo.py [--student digits-turbo|FOLDER] [--count 1000] [--only TEXT] [--picture FILE] [--out FILE]

Pictures have the captions of held-out real digits and are compared with those digits in the features of `digits-judge`, which
trained neither. The teacher runs with its own scheduler and classifier-free guidance of 2, the student without. Rows are written as
soon as they are measured and kept by the next run, if the weights that they are of are still the same.

Compare rows of one count only: of fewer pictures the Frechet distance is larger. Precision and density are shown beside a row of
noise, since the balls of this feature space are so wide that of 100 pictures of pure noise all lie in one.

The time of a picture is that of all that happens between a prompt that is encoded and pixels, decode included: the student at one
step and the teacher at 50 with guidance, in turn within each round of one process, medians. (CPU time on a CPU, so that other
processes do not count.)
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from genkit import zoo
from genkit.files import write_atomic
from genkit.images import contact_sheet, save_png
from genkit.measuring import seconds
from genkit.metrics.frechet import frechet_distance
from genkit.metrics.manifold import manifold_metrics
from genkit.pipelines import GuidedPipeline
from genkit.runner import load
from genkit.zoo import quality

COLUMNS = ("frechet", "digit", "ink", "paper", "precision", "recall", "density", "coverage")
TEACHER, CFG, FULL = "digits", 2.0, 50
BATCHES = {1: 7, 100: 3}  # rounds of timing by batch size
SHOWN = 8  # captions of the picture

Case = tuple[str, dict[str, Any]]  # a model, and arguments of its call


def cases(student: str) -> dict[str, Case]:
    """What is measured, by the name of the row; the long one is the last."""
    found: dict[str, Case] = {
        f"student, {steps} step{'s' * (steps > 1)}": (student, {"num_inference_steps": steps, "guidance_scale": 1.0})
        for steps in (1, 2, 4)
    }
    for steps in (1, 2, 4, FULL):
        found[f"teacher, {steps} step{'s' * (steps > 1)}, CFG {CFG:g}"] = (
            TEACHER,
            {"num_inference_steps": steps, "guidance_scale": CFG},
        )
    return found


def noise(count: int) -> dict[str, float]:
    """The figures of pictures of pure noise: what a column shows that says nothing."""
    judge, real = quality.load_judge(), quality.held_out(count).images
    pictures = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    (read, features), (_, truth) = quality.judged(judge, pictures), quality.judged(judge, real)
    accuracy = {name: (read[name] == getattr(quality.held_out(count), name)).float().mean().item() for name in read}
    return accuracy | {"frechet": frechet_distance(features, truth)} | manifold_metrics(features, truth)


def fingerprint(model: str) -> str:
    """Of a model's files: its figures are of these weights and this scheduler, wherever they are."""
    folder = zoo.path(model) if model in zoo.names() else Path(model)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".json") and file.name != "card.json":
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The JSON document of the measurements; what is measured already is not measured again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.document: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def row(self, section: str, name: str, key: dict[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The figures of a row, measured unless the document has it for the same key; written at once."""
        rows = self.document.setdefault(section, {})
        if rows.get(name, {}).get("measured") != key:
            rows[name] = {"measured": key} | measure()
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
            self.document["machine"] = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out, (json.dumps(self.document, indent=2) + "\n").encode())
            shown = {name: round(value, 4) for name, value in rows[name].items() if isinstance(value, float)}
            print(f"{section}, {name}: {shown}", flush=True)
        return rows[name]


@functools.cache
def pipeline(model: str) -> GuidedPipeline:
    """A model on the fastest device."""
    return load(model, device="cuda" if torch.cuda.is_available() else "cpu")


def speed(student: str, batch: int, rounds: int) -> dict[str, float]:
    """Medians of the seconds for a picture at a batch size, and their ratio."""
    captions = quality.held_out(batch).captions()
    sides: dict[str, Case] = {
        "student": (student, {"num_inference_steps": 1, "guidance_scale": 1.0}),
        "teacher": (TEACHER, {"num_inference_steps": FULL, "guidance_scale": CFG}),
    }

    def run(model: str, arguments: dict[str, Any]) -> None:
        pipeline(model)(captions, seeds=list(range(batch)), output_type="pt", **arguments)

    for model, arguments in sides.values():  # the prompts are encoded, and memory is there
        run(model, arguments | {"num_inference_steps": 1})
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (model, arguments) in sides.items():
            times[side].append(seconds(lambda model=model, arguments=arguments: run(model, arguments)) / batch)  # type: ignore[misc]
    median = {side: statistics.median(values) for side, values in times.items()}
    found = {f"{side}_seconds": value for side, value in median.items()}
    return found | {"student_over_teacher": median["student"] / median["teacher"]}


def sheet(student: str) -> Image.Image:
    """The teacher at 50 steps above the student at 4, 2 and 1, with captions of held-out digits; the same seeds in a column."""
    captions = quality.held_out(SHOWN).captions()
    chosen = [f"teacher, {FULL} steps, CFG {CFG:g}", "student, 4 steps", "student, 2 steps", "student, 1 step"]
    rows = []
    for name in chosen:
        model, arguments = cases(student)[name]
        rows.append(pipeline(model)(captions, seeds=list(range(SHOWN)), **arguments).images)
    return contact_sheet(rows, chosen, captions)


def main() -> None:
    """Measure what is missing, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="digits-turbo", help="an embedded student, or a folder of `genkit export`")
    parser.add_argument("--count", type=int, default=1000, help="pictures of a row")
    parser.add_argument("--only", default="", help="rows whose name contains this: student, teacher, speed, ...")
    parser.add_argument("--picture", type=Path, help="PNG file for pictures of both, side by side")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/turbo.json"))
    arguments = parser.parse_args()
    if arguments.student not in zoo.names() and not Path(arguments.student).is_dir():
        parser.error(f"--student {arguments.student!r} is neither a folder nor an embedded model ({', '.join(zoo.names())}).")
    results = Results(arguments.out)
    prints = {model: fingerprint(model) for model in (arguments.student, TEACHER)}

    speeds = {}
    for batch, rounds in BATCHES.items():
        if arguments.only in "speed":
            key = {"models": sorted(prints.values()), "rounds": rounds}
            name = f"batch {batch}"
            speeds[name] = results.row("speed", name, key, functools.partial(speed, arguments.student, batch, rounds))
    rows = {}
    if arguments.only in "noise":
        rows["noise"] = results.row("quality", "noise", {"count": arguments.count}, functools.partial(noise, arguments.count))
    for name, (model, options) in cases(arguments.student).items():
        if arguments.only in name:
            key = {"model": prints[model], "count": arguments.count, **options}
            measure = functools.partial(quality.against_held_out, pipeline(model), arguments.count, **options)
            rows[name] = results.row("quality", name, key, measure)

    console, table = Console(width=160), Table("", *COLUMNS, "Frechet / teacher's 50", box=None)
    base = rows.get(f"teacher, {FULL} steps, CFG {CFG:g}")
    for name, row in rows.items():
        ratio = f"{row['frechet'] / base['frechet']:.2f}" if base else ""
        table.add_row(name, *(f"{row[column]:.4g}" for column in COLUMNS), ratio)
    console.print(table)
    for name, row in speeds.items():
        console.print(
            f"{name}: student {1e3 * row['student_seconds']:.2f} ms a picture, teacher {1e3 * row['teacher_seconds']:.1f} ms, "
            f"1/{1 / row['student_over_teacher']:.1f}"
        )
    if arguments.picture is not None:
        save_png(sheet(arguments.student), arguments.picture)


if __name__ == "__main__":
    main()
