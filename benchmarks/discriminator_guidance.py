"""Discriminator guidance on `digits`: what it does to the pictures, alone, with classifier-free guidance, and with a classifier.

    python benchmarks/discriminator_guidance.py [--count 2000] [--only TEXT] [--out benchmarks/results/discriminator_guidance.json]

Pictures have the captions of held-out real digits and are compared with those digits in the features of `digits-judge`, which never
guides. Rows are written as soon as they are measured, and rows that are there already are kept, so a run can be interrupted. "pure"
is the paper's log-ratio alone (`matching=0`); the default also holds samples to their prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from genkit.classifiers import load_classifier
from genkit.guidance import ClassifierGuidance, DiscriminatorGuidance, load_discriminator
from genkit.pipelines import GuidedPipeline
from genkit.zoo import quality

COLUMNS = ("digit", "ink", "paper", "frechet", "precision", "recall", "density", "coverage")


def cases(count: int) -> dict[str, dict[str, Any]]:
    """What to measure: the arguments of `quality.against_held_out` by the name of the row."""
    discriminator = load_discriminator("digits-discriminator")
    guide, targets = load_classifier("digits-classifier"), quality.held_out(count).digit
    dg, pure = DiscriminatorGuidance(discriminator), DiscriminatorGuidance(discriminator, matching=0.0)

    def classifier(rows: slice) -> ClassifierGuidance:
        return ClassifierGuidance(guide, targets[rows])

    def both(rows: slice) -> Any:
        return classifier(rows) + dg

    found: dict[str, dict[str, Any]] = {}
    for steps in (10, 30):
        plain = {"num_inference_steps": steps, "guidance_scale": 1.0}
        found |= {
            f"{steps} steps": plain,
            f"{steps} steps, DG": plain | {"guidance": dg},
            f"{steps} steps, DG pure": plain | {"guidance": pure},
            f"{steps} steps, CFG 2": plain | {"guidance_scale": 2.0},
            f"{steps} steps, DG + CFG 2": plain | {"guidance_scale": 2.0, "guidance": dg},
        }
    plain = {"num_inference_steps": 10, "guidance_scale": 1.0}
    return found | {
        "10 steps, classifier": plain | {"guidance": classifier},
        "10 steps, classifier + DG": plain | {"guidance": both},
    }


def measure(out: Path, count: int, wanted: Callable[[str], bool]) -> dict[str, dict[str, float]]:
    """The rows, those of `out` included; each is written when it is done."""
    pipe = GuidedPipeline.from_pretrained("digits")
    document = json.loads(out.read_text()) if out.exists() else {}
    rows = document.get("rows", {}) if document.get("count") == count else {}
    machine = {"device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__, "python": platform.python_version()}
    for name, arguments in cases(count).items():
        if name not in rows and wanted(name):
            rows[name] = quality.against_held_out(pipe, count, **arguments)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({"machine": machine, "count": count, "rows": rows}, indent=2) + "\n")
            print(name, {key: round(value, 4) for key, value in rows[name].items()}, flush=True)
    return rows


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/discriminator_guidance.json"))
    arguments = parser.parse_args()
    rows = measure(arguments.out, arguments.count, lambda name: arguments.only in name)
    table = Table("", *COLUMNS, "Frechet / unguided", box=None)
    for name, row in rows.items():
        base = rows.get(name.split(",")[0])
        ratio = f"{row['frechet'] / base['frechet']:.3f}" if base else ""
        table.add_row(name, *(f"{row[column]:.4g}" for column in COLUMNS), ratio)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
