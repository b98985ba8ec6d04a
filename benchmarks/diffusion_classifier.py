"""Diffusion classifiers on real, held-out digits: accuracy, evaluations and seconds of each policy.

    python benchmarks/diffusion_classifier.py [--images 500] [--many 60] [--only ten|hundred] [--out FILE]

"ten": 10 classes, prompts "a seven". "hundred": digit x ten pairs of ink and paper, "a red seven on an orange background". The
pictures are the first of `digits.draw("test", 1000, seed=5)` (recoloured with the ten pairs for "hundred"); rows 500 to 700 of it
served for choosing settings. Policies take turns on the same pictures, part by part, so that the machine's mood is shared; parts
that are measured are kept, and a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from genkit.data import digits
from genkit.files import write_atomic
from genkit.pipelines import GuidedPipeline
from genkit.scoring import Exhaustive, FixedRounds, PairPlan, Policy, Race, Scorer, Taylor, Tree

PART = 20  # pictures that each policy gets in turn
PAIRS = 100
MANY_PAIRS = 64
COMBINATIONS = tuple((ink, (ink + 1 + i // 8 * 3) % 8) for i, ink in enumerate([*range(8), 0, 4]))  # ten pairs of ink and paper


@dataclasses.dataclass
class Problem:
    """Pictures, the prompt of each arm, the right arm of each picture, and the policies to compare."""

    images: torch.Tensor
    prompts: list[str]
    targets: list[int]
    plan: PairPlan
    policies: dict[str, Policy]
    leaves: int


def ten(count: int) -> Problem:
    """Ten digits; the published schedule for CIFAR-10, (5, 1) of (50, 500), scaled to a plan of 100."""
    batch = digits.draw("test", 1000, seed=5)
    policies: dict[str, Policy] = {
        "exhaustive": Exhaustive(),
        "rounds (CIFAR-10)": FixedRounds(to_keep=(5, 1), n_samples=(PAIRS // 10, PAIRS)),
        "race": Race(),
        "taylor, race": Taylor(shortlist=4, pairs=8),
    }
    prompts = [digits.with_articles(f"a {name}") for name in digits.DIGITS]
    return Problem(batch.images[:count], prompts, batch.digit[:count].tolist(), PairPlan(count=PAIRS), policies, 10)


def hundred(count: int) -> Problem:
    """Digit x ten pairs of ink and paper."""
    batch = digits.draw("test", 1000, seed=5)
    grey, _ = digits.strokes("test")
    which = torch.arange(count) % 10
    colors = torch.tensor(list(digits.PALETTE.values())) / 127.5 - 1
    ink, paper = (colors[[pair[k] for pair in COMBINATIONS]][which][:, :, None, None] for k in (0, 1))
    images = paper + grey[batch.stroke[:count]][:, None] * (ink - paper)
    leaves = [digits.caption(d, *pair) for d in range(10) for pair in COMBINATIONS]
    targets = [d * 10 + c for d, c in zip(batch.digit[:count].tolist(), which.tolist(), strict=True)]
    # Arms behind the leaves stand for each digit whatever its colours.
    groups = [digits.with_articles(f"a {name}") for name in digits.DIGITS]
    children = {100 + d: tuple(range(d * 10, (d + 1) * 10)) for d in range(10)}
    policies: dict[str, Policy] = {
        "exhaustive": Exhaustive(),
        "rounds (Aircraft)": FixedRounds(to_keep=(20, 10, 5, 1), n_samples=(3, 6, 13, 64)),
        "race": Race(),
        "tree": Tree(children=children),
        "tree, beam 2": Tree(children=children, beam=2),
        "taylor": Taylor(pairs=16, shortlist=10),
    }
    return Problem(images, leaves + groups, targets, PairPlan(count=MANY_PAIRS), policies, 100)


PROBLEMS = {"ten": ten, "hundred": hundred}


def measure(name: str, problem: Problem, scorer: Scorer, file: Path) -> dict[str, Any]:
    """Every policy on every part that `file` does not have yet."""
    done: dict[str, dict[str, list[Any]]] = json.loads(file.read_text()) if file.is_file() else {}
    with torch.inference_mode():
        x0 = scorer.denoiser.encode(problem.images).clone()
    for start in range(0, len(x0), PART):
        for title, policy in problem.policies.items():
            key = f"{name}/{title}/{start}"
            if key in done:
                continue
            arms = problem.prompts if isinstance(policy, Tree) else problem.prompts[: problem.leaves]
            cond = scorer.denoiser.condition(prompts=arms)
            began = time.perf_counter()
            verdicts = dict(scorer.run(x0[start : start + PART].clone(), cond, policy))
            done[key] = {
                "labels": [verdicts[i].label for i in range(len(verdicts))],
                "evaluations": [verdicts[i].evaluations for i in range(len(verdicts))],
                "bounds": [verdicts[i].error_bound for i in range(len(verdicts))],
                "seconds": [(time.perf_counter() - began) / len(verdicts)],
            }
            write_atomic(file, json.dumps(done).encode())
            print(key, f"{done[key]['seconds'][0]:.2f} s a picture", flush=True)
    return done


def summary(name: str, problem: Problem, done: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy, agreement with exhaustive scoring, evaluations and seconds a picture, and their ratios to exhaustive."""
    targets, rows = np.array(problem.targets), {}
    starts = range(0, len(targets), PART)

    def column(title: str, what: str) -> np.ndarray:
        return np.concatenate([done[f"{name}/{title}/{start}"][what] for start in starts])

    full = column("exhaustive", "labels")
    for title in problem.policies:
        labels, evaluations, seconds = (column(title, what) for what in ("labels", "evaluations", "seconds"))
        rows[title] = {
            "accuracy": float((labels == targets).mean()),
            "agreement": float((labels == full).mean()),
            "evaluations": float(evaluations.mean()),
            "of_exhaustive": float(evaluations.mean() / column("exhaustive", "evaluations").mean()),
            "seconds": float(seconds.mean()),
            "time_of_exhaustive": float(seconds.sum() / column("exhaustive", "seconds").sum()),
            "error_bound": float(column(title, "bounds").mean()),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="pictures for ten classes")
    parser.add_argument("--many", type=int, default=60, help="pictures for 100 classes")
    parser.add_argument("--only", choices=list(PROBLEMS), action="append")
    parser.add_argument("--metric", default="l2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--parts", type=Path, default=Path("diffusion_classifier_parts.json"), help="what is measured so far")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "diffusion_classifier.json")
    options = parser.parse_args()
    pipe = GuidedPipeline.from_pretrained("digits")
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for name in options.only or PROBLEMS:
        problem = PROBLEMS[name](options.images if name == "ten" else options.many)
        scorer = Scorer(pipe.denoiser, problem.plan, metric=options.metric, batch_size=options.batch)
        rows = summary(name, problem, measure(name, problem, scorer, options.parts))
        results[name] = {
            "images": len(problem.targets), "classes": problem.leaves, "pairs": problem.plan.count, "weighting": "uniform",
            "metric": options.metric, "threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine(),
            "rows": rows,
        }  # fmt: skip
        table = Table(title=f"{name}: {problem.leaves} classes, {len(problem.targets)} pictures, {problem.plan.count} pairs")
        for column in ("policy", *next(iter(rows.values()))):
            table.add_column(column.replace("_", " "), justify="left" if column == "policy" else "right")
        for title, row in rows.items():
            table.add_row(title, *(f"{value:.3f}" if value < 10 else f"{value:.0f}" for value in row.values()))
        Console(width=140).print(table)
        options.out.parent.mkdir(exist_ok=True)
        write_atomic(options.out, json.dumps(results, indent=2).encode())


if __name__ == "__main__":
    main()
