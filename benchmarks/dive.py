"""Classification by inversion on 300 held-out real digits: 100 classes, as in `diffusion_classifier.py` (digit x colours).

    python benchmarks/dive.py [--images 300] [--pairs 16] [--work FOLDER] [--out FILE]

* exhaustive: every class on every pair. "race" and "rounds" are replayed on these losses, since they ask for nothing else.
* dive: `Dive()`. Its settings were chosen on other pictures of the same draw (14, and for the patience 250).
* descent: the published schedule (straight-through, AdamW, 20 loops, every class that ends a loop scored on all pairs), on the
  first 100 pictures. The publication has no setting for text: lr is 0.1 and 0.3 of the vocabulary's spread, the second with 4
  walkers too.
* memoised: that schedule with and without remembering, 6 pictures: the same course to the last bit, fewer evaluations.

Evaluations are forward-equivalents, a backward pass counts as one. Everything that is measured is kept in FOLDER, and a run that
was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_classifier import hundred
from rich.console import Console
from rich.table import Table

from genkit.attention.folding import evaluator
from genkit.denoisers import Cond
from genkit.files import write_atomic
from genkit.inversion import ConditionSlot, Descent, DiscreteInverter, Optimiser, Stop
from genkit.metrics.accuracy import accuracy
from genkit.pipelines import GuidedPipeline
from genkit.scoring import Dive, Exhaustive, FixedRounds, PairPlan, Policy, Race, Scorer, Verdict

CLASSES, PART = 100, 20
DESCENTS, MEMOISED = 100, 6  # pictures


def losses(file: Path, scorer: Scorer, x0: torch.Tensor, cond: Cond) -> tuple[np.ndarray, float]:
    """Losses (I, 100, N) of everything, and CPU seconds a picture. What the file has is not measured again."""
    count, known = scorer.plan.count, dict(np.load(file)) if file.is_file() else {}
    table = known.get("losses", np.full((len(x0), CLASSES, count), np.nan))
    seconds = known.get("seconds", np.zeros(count))
    evaluate = evaluator(scorer.denoiser, cond)
    for start in range(0, count, 8):
        pairs = np.arange(start, min(start + 8, count))
        for i in np.flatnonzero(np.isnan(table[:, :, pairs]).any((1, 2))):
            began = time.process_time()
            for n in np.split(pairs, range(2, len(pairs), 2)):
                rows = np.tile(np.arange(CLASSES), len(n))
                values = scorer.losses(evaluate, x0[i : i + 1], np.zeros(len(rows), int), rows, n.repeat(CLASSES))
                table[i][:, n] = values.reshape(len(n), CLASSES).T
            seconds[pairs] += (time.process_time() - began) / len(pairs)
            if i % PART == PART - 1 or i == len(x0) - 1:
                keep(file, losses=table, seconds=seconds)
                print(f"losses: {i + 1} pictures, pairs to {pairs[-1] + 1}", flush=True)
        keep(file, losses=table, seconds=seconds)
    return table, float(seconds.sum() / len(x0))


def keep(file: Path, **arrays: np.ndarray) -> None:
    """Write arrays, whole or not at all."""
    part = file.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(file)


def replayed(policy: Policy, table: np.ndarray, u: np.ndarray) -> Iterator[Verdict]:
    """A policy that asks for losses alone, on known ones."""
    for picture in table:
        search = policy.search(CLASSES, u)
        request = next(search)
        while True:
            try:
                request = search.send(picture[request.arms, request.pairs])
            except StopIteration as stop:
                yield stop.value
                break


def measured(name: str, policy: Policy, scorer: Scorer, x0: torch.Tensor, cond: Cond, file: Path) -> dict[str, list[float]]:
    """Labels, evaluations and CPU seconds of a policy, part by part."""
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for start in range(0, len(x0), PART):
        key = f"{name}/{start}"
        if key not in done:
            began = time.process_time()
            verdicts = dict(scorer.run(x0[start : start + PART], cond, policy))
            done[key] = {
                "labels": [verdicts[i].label for i in range(len(verdicts))],
                "evaluations": [verdicts[i].evaluations for i in range(len(verdicts))],
                "seconds": [(time.process_time() - began) / len(verdicts)] * len(verdicts),
            }
            write_atomic(file, json.dumps(done).encode())
            print(key, f"{done[key]['seconds'][0]:.2f} s a picture", flush=True)
    parts = [done[f"{name}/{start}"] for start in range(0, len(x0), PART)]
    return {what: [value for part in parts for value in part[what]] for what in parts[0]}


def published(pairs: int, lr: float = 0.1, restarts: int = 1) -> Dive:
    """The published schedule, scaled to a plan of fewer pairs."""
    search = Descent(
        optimiser=Optimiser(lr=lr, weight_decay=0.01, start="published"), batch=pairs // 10 or 1, shuffle=True, restarts=restarts,
        stop=Stop(loops=20, patience=None),
    )  # fmt: skip
    return Dive(proposer=search, shortlist=2, inner=Exhaustive())


def memoised(scorer: Scorer, x0: torch.Tensor, cond: Cond) -> dict[str, Any]:
    """The published schedule, remembering and not."""
    slots = ConditionSlot(scorer.denoiser, cond)
    search = published(scorer.plan.count).proposer
    found = [
        DiscreteInverter(scorer.denoiser, slots, search=search, plan=scorer.plan, memoise=wanted, batch_size=8).fit(x0)
        for wanted in (True, False)
    ]
    counts = [[each.evaluations for each in run] for run in found]
    return {
        "images": len(x0), "same_course": all(a.trace == b.trace for a, b in zip(*found, strict=True)),
        "memoised": counts[0], "unmemoised": counts[1],
        "ratio": float(np.sum(counts[1]) / np.sum(counts[0])), "least_ratio": float(np.min(np.divide(*counts[::-1]))),
    }  # fmt: skip


def row(labels: Any, evaluations: Any, seconds: float | None, targets: np.ndarray, full: np.ndarray, pairs: int) -> dict[str, Any]:
    """What is reported of a policy, on the first pictures."""
    targets, full = targets[: len(labels)], full[: len(labels)]
    right = accuracy(labels, targets)
    return {
        "images": len(labels), "accuracy": right.value, "low": right.low, "high": right.high,
        "agreement": float((np.array(labels) == full).mean()),
        "evaluations": float(np.mean(evaluations)), "most": int(np.max(evaluations)),
        "of_exhaustive": float(np.mean(evaluations)) / (CLASSES * pairs), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("dive"), help="what is measured so far")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dive.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    problem = hundred(options.images)
    denoiser = GuidedPipeline.from_pretrained("digits").denoiser
    scorer = Scorer(denoiser, PairPlan(count=options.pairs))
    with torch.no_grad():
        x0 = denoiser.encode(problem.images)
    cond, targets = denoiser.condition(prompts=problem.prompts[:CLASSES]), np.array(problem.targets)
    u = scorer.pairs(x0.shape[1:]).u
    table, seconds = losses(options.work / f"losses_{options.pairs}.npz", scorer, x0, cond)

    policies = {
        "dive": Dive(),
        "descent, lr 0.1": published(options.pairs),
        "descent, lr 0.3": published(options.pairs, 0.3),
        "descent, lr 0.3, 4 walkers": published(options.pairs, 0.3, 4),
    }
    found = {}
    for name, policy in policies.items():
        count = len(x0) if name == "dive" else DESCENTS
        found[name] = measured(name, policy, scorer, x0[:count], cond, options.work / f"policies_{options.pairs}.json")
    memory = memoised(scorer, x0[:MEMOISED], cond)
    full = table.mean(2).argmin(1)
    rows = {"exhaustive": row(full, [CLASSES * options.pairs], seconds, targets, full, options.pairs)}
    rounds = FixedRounds(to_keep=(20, 10, 5, 1), n_samples=tuple(options.pairs // n for n in (16, 8, 4, 1)))
    for name, policy in {"rounds": rounds, "race": Race()}.items():
        verdicts = list(replayed(policy, table, u))
        rows[name] = row([v.label for v in verdicts], [v.evaluations for v in verdicts], None, targets, full, options.pairs)
    for name, parts in found.items():
        rows[name] = row(parts["labels"], parts["evaluations"], float(np.mean(parts["seconds"])), targets, full, options.pairs)

    result = {
        "images": options.images, "classes": CLASSES, "pairs": options.pairs, "weighting": "uniform", "metric": "l2",
        "threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine(), "rows": rows, "memoised": memory,
    }  # fmt: skip
    grid = Table(title=f"{CLASSES} classes, {options.images} pictures, {options.pairs} pairs")
    for column in ("policy", *rows["dive"]):
        grid.add_column(column.replace("_", " "), justify="left" if column == "policy" else "right")
    for name, values in rows.items():
        grid.add_row(
            name, *("" if v is None else f"{v:.3f}" if isinstance(v, float) and v < 10 else f"{v:.0f}" for v in values.values())
        )
    Console(width=150).print(grid, memory)
    options.out.parent.mkdir(exist_ok=True)
    write_atomic(options.out, json.dumps(result, indent=2).encode())


if __name__ == "__main__":
    main()
