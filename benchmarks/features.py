"""What the embedded `digits` model's features are worth: linear probes by block and noise, few labels, and early exit.

    python benchmarks/features.py [--work DIR] [--draws 10] [--rounds 15] [--out benchmarks/results/features.json]

Probes read the digit of real handwritten digits in random colours. They are trained on pictures of the 4,000 training digits (which
the model has seen, without being told to classify them), 12,000 in other colours for the probe of all labels, and tested on the
1,000 held-out ones. Among the candidates below, block, noise and penalty are chosen by cross-validation on training digits
alone, no digit on both sides of a split; with few labels, on those few alone. The candidates themselves and the solver were
picked after looking at held-out accuracy, so a test on three more colourings of the held-out digits, which nothing was picked
on, stands beside it. Early exit is timed against the full pass in turn, so that a change of the machine's speed hits both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.console import progress
from genkit.data import digits
from genkit.data.source import ImageSource, open_source
from genkit.features import FeatureCache, FeatureExtractor
from genkit.features.extractor import shrink
from genkit.features.linear import fit_linear_probe
from genkit.features.probe import classes_of
from genkit.features.taps import blocks_of
from genkit.pipelines import GuidedPipeline

TIMES = [30, 100, 200, 400]
COLORED = 12_000  # pictures for the probe of all labels
FRESH = (123, 124, 125)  # seeds of further colourings
LABELS_PER_CLASS = 10
GATE = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0"  # the gated layer of the last attention block
Place = tuple[str, int]  # tap, position in TIMES
CHOICES: dict[str, list[Place]] = {  # one block, or several places side by side
    "block.6 at t 30": [("block.6", 0)],
    "block.6 at t 100": [("block.6", 1)],
    "block.6, block.8 at t 30": [("block.6", 0), ("block.8", 0)],
    "block.6, block.8 at t 100": [("block.6", 1), ("block.8", 1)],
    "block.6, gate at t 100": [("block.6", 1), (GATE, 1)],
    "block.6, block.8, gate at t 100": [("block.6", 1), ("block.8", 1), (GATE, 1)],
    "block.6, block.8 at t 30, 100": [(tap, i) for tap in ("block.6", "block.8") for i in (0, 1)],
}


def vectors(cache: FeatureCache, places: Sequence[Place], side: int = 2) -> Tensor:
    """Features (N, D) of some taps and times, side by side; blocks pooled to `side` steps, the wide gate to 2."""
    found = [(torch.from_numpy(cache[tap][:, 0, i].astype("float32")), 2 if tap == GATE else side) for tap, i in places]
    return torch.cat([shrink(value, steps).flatten(1) for value, steps in found], dim=1)


def targets(source: ImageSource) -> Tensor:
    """The digit (N,) of each row, by the classes' order."""
    number = {label: i for i, label in enumerate(classes_of(source))}
    return torch.tensor([number[label] for label in source.labels or []])


def accuracy(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> float:
    """Share that a linear classifier reads right."""
    return ((features @ weight.T + bias).argmax(1) == labels).float().mean().item()


def by_place(cache: FeatureCache, labels: Tensor, taps: Sequence[str]) -> dict[str, list[float]]:
    """Cross-validated accuracy on training digits, by tap and time, with 2 x 2 features."""
    rows: dict[str, list[float]] = {tap: [] for tap in taps}
    with progress() as bar:
        task = bar.add_task("blocks and times", total=len(taps) * len(TIMES))
        for tap in taps:
            for i in range(len(TIMES)):
                rows[tap].append(fit_linear_probe(vectors(cache, [(tap, i)]), labels, 10)[2]["accuracy"])
                bar.advance(task)
    return rows


def all_labels(denoiser: Any, train: FeatureCache, test: FeatureCache, labels: Tensor, truth: Tensor) -> dict[str, Any]:
    """The choice with the best cross-validated accuracy, and its accuracy on the held-out digits, also in fresh colours."""
    groups = torch.tensor(train.groups)
    fits = {}
    with progress() as bar:
        task = bar.add_task("probes of all labels", total=len(CHOICES))
        for name, places in CHOICES.items():
            fits[name] = fit_linear_probe(vectors(train, places, 4), labels, 10, groups=groups)
            bar.advance(task)
    validated = {name: figures for name, (_, _, figures) in fits.items()}
    best = max(validated, key=lambda name: validated[name]["accuracy"])
    one = max(list(CHOICES)[:2], key=lambda name: validated[name]["accuracy"])
    tested = {name: accuracy(*fits[name][:2], vectors(test, CHOICES[name], 4), truth) for name in (best, one)}
    fresh = [in_other_colors(denoiser, fits[best], CHOICES[best], seed) for seed in FRESH]
    return {
        "pictures": len(train), "validated": validated, "chosen": best, "test": tested[best], "one_block": one,
        "test_of_one_block": tested[one], "test_in_fresh_colours": fresh,
    }  # fmt: skip


def in_other_colors(denoiser: Any, fit: tuple[Tensor, Tensor, Any], places: Sequence[Place], seed: int) -> float:
    """Accuracy on the held-out digits in colours of another seed."""
    batch = digits.draw("test", 1000, seed=seed)
    extractor = FeatureExtractor(denoiser, list(dict.fromkeys(tap for tap, _ in places)), t=TIMES, pool=4)
    found = [extractor(part) for part in batch.images.split(50)]
    inputs = torch.cat(
        [shrink(torch.cat([f[tap][:, i] for f in found]), 2 if tap == GATE else 4).flatten(1) for tap, i in places], 1
    )
    order = sorted(digits.DIGITS)
    truth = torch.tensor([order.index(digits.DIGITS[d]) for d in batch.digit.tolist()])
    return accuracy(*fit[:2], inputs, truth)


def few_labels(
    train: FeatureCache, test: FeatureCache, pixels: tuple[Tensor, Tensor], labels: Tensor, truth: Tensor, draws: int
) -> dict[str, Any]:
    """Mean test accuracy of probes on ten labels a class: on features and on raw pixels."""
    candidates = {f"{tap} at t {TIMES[i]}": [(tap, i)] for tap in ("block.5", "block.6", "block.8") for i in (0, 1, 2)}
    inputs = {name: (vectors(train, places), vectors(test, places)) for name, places in candidates.items()}
    reads: dict[str, list[float]] = {"features": [], "pixels": []}
    picked = []
    with progress() as bar:
        task = bar.add_task("draws of labels", total=draws)
        for draw in range(draws):
            g = torch.Generator().manual_seed(draw)
            rows = torch.cat(
                [torch.nonzero(labels == k)[torch.randperm(400, generator=g)[:LABELS_PER_CLASS], 0] for k in range(10)]
            )
            fits = {name: fit_linear_probe(f[rows], labels[rows], 10) for name, (f, _) in inputs.items()}
            best = max(fits, key=lambda name: fits[name][2]["accuracy"])
            picked.append(best)
            reads["features"].append(accuracy(*fits[best][:2], inputs[best][1], truth))
            weight, bias, _ = fit_linear_probe(pixels[0][rows], labels[rows], 10)
            reads["pixels"].append(accuracy(weight, bias, pixels[1], truth))
            bar.advance(task)
    means = {name: statistics.mean(values) for name, values in reads.items()}
    spread = {f"{name}_spread": statistics.stdev(values) for name, values in reads.items()}
    return {**means, **spread, "gain": means["features"] - means["pixels"], "draws": draws, "picked": picked}


@torch.no_grad()
def early_exit(denoiser: Any, rounds: int) -> dict[str, Any]:
    """Time of a pass that ends at the middle block against the whole one."""
    x0 = torch.randn(50, *denoiser.latent_shape(None, None), generator=torch.Generator().manual_seed(0)).to(denoiser.device)
    passes = {name: FeatureExtractor(denoiser, "mid", t=100, early_exit=name == "early") for name in ("early", "full")}
    found = {name: extractor(latents=x0)["mid"] for name, extractor in passes.items()}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, extractor in passes.items():
            began = time.perf_counter()
            extractor(latents=x0)
            times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "identical": torch.equal(found["early"], found["full"]),
        **{f"{name}_ms": 1e3 * value for name, value in median.items()},
        "ratio": median["early"] / median["full"],
    }


def report(results: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    table = Table("block", *(f"t {t}" for t in TIMES), box=None, title="cross-validated accuracy, training digits, 2 x 2 features")
    for tap, row in results["by_block"].items():
        table.add_row(tap, *(f"{value:.1%}" for value in row))
    console.print(table)
    table = Table("probe of all labels", "validation", "penalty", box=None)
    for name, figures in results["all_labels"]["validated"].items():
        table.add_row(name, f"{figures['accuracy']:.1%}", f"{figures['penalty']:g}")
    console.print(table)
    whole, few, timing = results["all_labels"], results["few_labels"], results["early_exit"]
    table = Table("what", "figure", box=None)
    table.add_row(f"{whole['pictures']:,} pictures, held-out digits: {whole['chosen']}", f"{whole['test']:.1%}")
    table.add_row("  in three other colourings", ", ".join(f"{value:.1%}" for value in whole["test_in_fresh_colours"]))
    table.add_row(f"  one block: {whole['one_block']}", f"{whole['test_of_one_block']:.1%}")
    table.add_row("  raw pixels", f"{whole['test_of_pixels']:.1%}")
    for name in ("features", "pixels"):
        table.add_row(f"100 labels, {few['draws']} draws: {name}", f"{few[name]:.1%} +- {few[f'{name}_spread']:.1%}")
    table.add_row("early exit at the middle: identical features", str(timing["identical"]))
    table.add_row("  time, early / full", f"{timing['early_ms']:.0f} / {timing['full_ms']:.0f} ms = {timing['ratio']:.3f}")
    console.print(table)


def run(work: Path, draws: int, rounds: int) -> dict[str, Any]:
    """Everything that is measured."""
    denoiser = GuidedPipeline.from_pretrained("digits").denoiser
    results: dict[str, Any] = {"early_exit": early_exit(denoiser, rounds)}
    blocks = blocks_of(denoiser.network)
    extractor = FeatureExtractor(denoiser, [*blocks, GATE], t=TIMES, pool=4)
    sources = {
        "train": open_source("digits", 4000), "test": open_source("digits-test", 1000), "colored": open_source("digits", COLORED),
    }  # fmt: skip
    caches = {}
    with progress() as bar:
        for name, source in sources.items():
            task = bar.add_task(f"features, {name}", total=len(source))
            caches[name] = FeatureCache.build(
                extractor, source, work / name, resume=True, progress=lambda rows, task=task: bar.advance(task, rows)
            )
    labels, truth, colored = (targets(source) for source in sources.values())
    pixels = {name: source.images(range(len(source)), (32, 32)).flatten(1) for name, source in sources.items()}
    rows = by_place(caches["train"], labels, blocks)
    whole = all_labels(denoiser, caches["colored"], caches["test"], colored, truth)
    weight, bias, _ = fit_linear_probe(pixels["colored"], colored, 10, groups=torch.tensor(caches["colored"].groups))
    whole["test_of_pixels"] = accuracy(weight, bias, pixels["test"], truth)
    few = few_labels(caches["train"], caches["test"], (pixels["train"], pixels["test"]), labels, truth, draws)
    return {"times": TIMES, "by_block": rows, "all_labels": whole, "few_labels": few, **results}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder that keeps the features for another run")
    parser.add_argument("--draws", type=int, default=10, help="draws of 10 labels a class")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/features.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = run(arguments.work or Path(scratch), arguments.draws, arguments.rounds)
    report(results)
    machine = {"device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__, "python": platform.python_version()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
