"""Shortcuts: a generative classifier against a discriminative one of the same size, where the ink tells the digit in training only.

    python benchmarks/shortcut.py [--work runs/shortcut] [--pairs 1024] [--out benchmarks/results/shortcut.json]
    python benchmarks/shortcut.py --only generative --channels 96,192 --dropout 0.1 --device cuda --work runs/b --out b.json
    python benchmarks/shortcut.py --merge a.json b.json c.json

Both see the same 3,600 pictures of `genkit.data.shortcut`, without augmentation, and the weights of both are chosen on the same
in-distribution validation pictures. A folder that holds no finished model is trained into first, an interrupted run goes on. The
generative one is what `genkit train classifier-diffusion --channels 64,128 --times logit-normal:0,1 --steps 6500 --batch 128
--no-bf16` makes. Its label is argmin_y of the mean diffusion loss, all classes on the same pairs of noise level and noise; classes
are equally frequent. Which part of the noise levels counts (one of `SPANS`) is what is best in validation; the test sets are then
raced. Losses and answers are kept in its folder, so a run can be interrupted. The baseline is trained from several seeds.

With `--merge`, one of several generative classifiers is chosen by the same validation, and set against the baseline of its size;
the others are reported too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from clock import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.classifiers import AttributeClassifier, load_classifier
from genkit.console import progress
from genkit.data import shortcut
from genkit.data.source import open_source
from genkit.files import write_atomic
from genkit.metrics.accuracy import accuracy, class_balanced_accuracy, group_accuracy, worst_group_accuracy
from genkit.pipelines import DiffusionClassifierPipeline
from genkit.runner import load
from genkit.scoring import PairPlan, Scorer, fit_temperature, posterior
from genkit.training import TrainConfig, fit
from genkit.zoo.training.class_conditional import TRAIN, ClassConditionalConfig, train_class_conditional

# The parts of the training time that may be scored; validation chooses. Below all of them everything is visible and the class
# should not matter, above them next to nothing is.
WHOLE = (0.15, 0.9)
SPANS = (WHOLE, (0.15, 0.65), (0.25, 0.75), (0.35, 0.8), (0.45, 0.65))
VALIDATION_PAIRS = 96  # over `WHOLE`
REPORTED = ("test_ood", "test_id")
COLUMNS = (
    ("test_id", "accuracy"), ("test_id", "worst_group"), ("test_ood", "accuracy"), ("test_ood", "class_balanced"),
    ("test_ood", "worst_group"),
)  # fmt: skip
GENERATIVE = ClassConditionalConfig(
    block_out_channels=(64, 128), times="logit-normal:0,1", train=dataclasses.replace(TRAIN, steps=6500, batch_size=128, bf16=False)
)
# For each width of the generative one the baseline with as many parameters to within 2 %: a residual network of eight blocks.
NETWORKS: dict[tuple[int, ...], tuple[int, ...]] = {
    (64, 128): (40, 80, 168, 328), (96, 192): (56, 120, 248, 472), (128, 256): (80, 152, 320, 632),
}  # fmt: skip
DISCRIMINATIVE = TrainConfig(
    steps=3000, batch_size=64, lr=1e-3, warmup=100, ema_decay=0.99, seed=62, validate_every=57, patience=10
)  # a validation an epoch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How to train and to measure.

    Args:
        config: of the generative one.
        pairs: of the plan that the test sets are raced on.
        device: of everything.
        batch_size: network evaluations at a time.
        chunk: pictures whose answers are kept together.
        limit: pictures of each split that is measured, from all classes; None for all.
        steps: of training both, for a try.
    """

    config: ClassConditionalConfig = GENERATIVE
    pairs: int = 1024
    device: str = "cpu"
    batch_size: int = 128
    chunk: int = 50
    limit: int | None = None
    steps: int | None = None

    def load(self, split: str) -> shortcut.ShortcutBatch:
        """The pictures of a split."""
        batch = shortcut.load(split)
        return batch if self.limit is None else batch[:: -(-len(batch) // self.limit)]


def train_generative(folder: Path, way: Way) -> None:
    """Train the generative classifier from labelled folders, as the command does."""
    data = folder / "data"
    if not data.exists():
        shortcut.write(data, splits=("train", "val"))
    train_class_conditional(
        open_source(data / "train"), folder, way.config, validation=open_source(data / "val"), resume=True, device=way.device
    )


def train_discriminative(folder: Path, seed: int, way: Way) -> None:
    """Train the baseline by cross-entropy, with early stopping on validation accuracy."""
    train, val = shortcut.load("train"), shortcut.load("val")
    torch.manual_seed(seed)
    network: dict[str, Any] = {"block_out_channels": NETWORKS[way.config.block_out_channels], "layers_per_block": 2}
    model = AttributeClassifier(labels={"digit": list(shortcut.CLASSES)}, **network)
    images, digit = train.images.to(way.device), train.digit.to(way.device)

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(images), (DISCRIMINATIVE.batch_size,), generator=generator).to(way.device)
        return F.cross_entropy(model(images[rows]).float(), digit[rows])

    def validate(model: Any) -> dict[str, float]:
        logits = torch.cat([model(part.to(way.device)).float().cpu() for part in val.images.split(100)])
        errors = (logits.argmax(1) != val.digit).float().mean().item()
        # Accuracy decides, as in the paper; of equals the lower cross-entropy.
        return {"loss": errors + 1e-3 * F.cross_entropy(logits, val.digit).item(), "errors": errors}

    loop = dataclasses.replace(DISCRIMINATIVE, seed=seed, steps=way.steps or DISCRIMINATIVE.steps)
    best = fit(
        model, loss, loop, folder / "training", name="discriminative", resume=True, device=way.device, validate=validate
    )  # fmt: skip
    best.to("cpu").save_pretrained(folder)


def validation_losses(folder: Path, split: str, way: Way) -> np.ndarray:
    """Losses (N, K, T) of all pictures of a split and all classes on the pairs of `WHOLE`; kept in the folder."""
    file = folder / "losses" / f"{split}.npy"
    if not file.exists():
        denoiser = load(str(folder), device=way.device).denoiser
        plan = PairPlan(count=VALIDATION_PAIRS, span=WHOLE)
        scorer = Scorer(denoiser, plan, batch_size=way.batch_size)
        cond = denoiser.condition(prompts=list(shortcut.CLASSES))
        tables = []
        with progress() as bar:
            images = way.load(split).images
            task = bar.add_task(f"losses of {split}", total=len(images))
            for part in images.split(20):
                with torch.no_grad():
                    latents = denoiser.encode(part.to(way.device))
                tables.append(scorer.table(latents, cond).float())
                bar.update(task, advance=len(part))
        file.parent.mkdir(exist_ok=True)
        np.save(file, torch.cat(tables).numpy())
    return np.load(file)


def choose_span(folder: Path, way: Way) -> dict[str, Any]:
    """The span of the best accuracy in distribution, its accuracy and log-likelihood, and the accuracy of each span.

    Of the validation pictures 95 % agree with their ink, and nearly all of these are right whatever the span; what differs are the
    rest, 20 of 400. So the two strata are estimated apart: pictures that agree from "val", and those that do not from "val_rare".
    """
    splits = [way.load("val"), way.load("val_rare")]
    agreeing, truth = splits[0].agrees.numpy(), [split.digit.numpy() for split in splits]
    losses = [validation_losses(folder, split, way) for split in ("val", "val_rare")]
    u = PairPlan(count=VALIDATION_PAIRS, span=WHOLE).times(1000)
    choices = []
    for span in SPANS:
        scores = [each[:, :, (u >= span[0]) & (u <= span[1])].mean(2) for each in losses]
        temperature = fit_temperature(scores[0], truth[0])
        probabilities = [posterior(each, temperature) for each in scores]
        right = [each.argmax(1) == t for each, t in zip(probabilities, truth, strict=True)]
        likely = [np.log(each[np.arange(len(t)), t]) for each, t in zip(probabilities, truth, strict=True)]
        # Accuracy decides; of equals the more probable labels.
        choices.append((*(_stratified(values, agreeing) for values in (right, likely)), span))
    accuracy, likelihood, span = max(choices)
    each = {f"{low} to {high}": right for right, _, (low, high) in choices}
    return {"span": span, "validation": [accuracy, likelihood], "validation_accuracy": each}


def _stratified(values: list[np.ndarray], agreeing: np.ndarray) -> float:
    """The mean in distribution of values of "val" and "val_rare"."""
    return shortcut.AGREEMENT * float(values[0][agreeing].mean()) + (1 - shortcut.AGREEMENT) * float(values[1].mean())


def raced(folder: Path, split: str, span: tuple[float, float], way: Way) -> tuple[np.ndarray, float]:
    """Predicted labels (N,) of a split, and evaluations a picture; answers are kept in the folder."""
    pipe = None
    labels, evaluations = [], []
    images = way.load(split).images
    with progress() as bar:
        task = bar.add_task(f"race of {split}", total=len(images))
        for start in range(0, len(images), way.chunk):
            file = folder / "losses" / f"{split}-{span[0]}-{span[1]}-{way.pairs}-{start}.json"
            if not file.exists():
                if pipe is None:
                    pipe = DiffusionClassifierPipeline.from_pretrained(folder).to(way.device)
                    pipe.set_progress_bar_config(disable=True)
                out = pipe(
                    images[start : start + way.chunk], prompts={name: name for name in shortcut.CLASSES}, policy="race",
                    plan=PairPlan(count=way.pairs, span=span), batch_size=way.batch_size,
                )  # fmt: skip
                answers = {"labels": [shortcut.CLASSES.index(label) for label in out.labels], "evaluations": out.evaluations}
                write_atomic(file, json.dumps(answers).encode())
            answers = json.loads(file.read_text())
            labels += answers["labels"]
            evaluations += answers["evaluations"]
            bar.update(task, completed=len(labels))
    return np.array(labels), float(np.mean(evaluations))


def generative(folder: Path, way: Way) -> dict[str, Any]:
    """The generative classifier's figures, and how they were found."""
    if not (folder / "card.json").exists():
        train_generative(folder, way)
    how = choose_span(folder, way)
    labels, evaluations = {}, {}
    for split in REPORTED:
        labels[split], evaluations[split] = raced(folder, split, how["span"], way)
    card = json.loads((folder / "card.json").read_text())
    network = {"channels": way.config.block_out_channels, "dropout": way.config.dropout, "parameters": card["parameters"]}
    return {**network, "kept": card["kept"], "figures": figures(labels, way), **how, "evaluations_per_picture": evaluations}


def discriminative(folder: Path, seed: int, way: Way) -> dict[str, Any]:
    """The baseline's figures."""
    if not (folder / "config.json").exists():
        train_discriminative(folder, seed, way)
    model = load_classifier(str(folder)).to(way.device)
    with torch.no_grad():
        labels = {
            split: torch.cat([model(part.to(way.device)).argmax(1).cpu() for part in way.load(split).images.split(100)]).numpy()
            for split in REPORTED
        }
    parameters = sum(p.numel() for p in model.parameters())
    return {"channels": way.config.block_out_channels, "seed": seed, "parameters": parameters, "figures": figures(labels, way)}


def figures(labels: dict[str, np.ndarray], way: Way) -> dict[str, Any]:
    """The accuracies of one classifier."""
    found: dict[str, Any] = {}
    for split, predicted in labels.items():
        batch = way.load(split)
        truth, agrees = batch.digit.numpy(), batch.agrees.numpy()
        group, worst = worst_group_accuracy(predicted, truth, batch.groups.numpy())
        found[split] = {
            "accuracy": accuracy(predicted, truth),
            "class_balanced": class_balanced_accuracy(predicted, truth),
            "conflicting": group_accuracy(predicted, truth, agrees)[False],
            "worst_group": worst,
        }
        found[split] = {name: dataclasses.asdict(value) for name, value in found[split].items()}
        name = f"{shortcut.CLASSES[group // 2]}, ink {'conflicts' if group % 2 else 'agrees'}"
        found[split]["worst_group"]["group"] = name
        # How often a wrong label is the one that the ink stands for.
        wrong = predicted != truth
        found[split]["errors_that_follow_the_ink"] = float((predicted == batch.ink.numpy())[wrong].mean()) if wrong.any() else None
    return found


def document(models: dict[str, list[dict[str, Any]]], pairs: int, machines: list[dict[str, str]]) -> dict[str, Any]:
    """The generative classifier that is best in validation, the baselines of its size (the first one's figures, and all seeds),
    and what else was tried."""
    found: dict[str, Any] = {"machine": machines[0] if len(machines) == 1 else machines, "pairs": pairs}
    best = max(models["generative"], key=lambda row: row["validation"], default=None)
    if best is not None:
        found["generative"] = best
    beside = [row for row in models["discriminative"] if best is None or tuple(row["channels"]) == tuple(best["channels"])]
    if beside:
        found["discriminative"] = {**beside[0], "seeds": beside}
    if best is not None and beside:
        found["out_of_distribution_gap"] = ood(best) - statistics.mean(map(ood, beside))
    found["others"] = {kind: [row for row in rows if row is not best and row not in beside] for kind, rows in models.items()}
    return found


def ood(row: dict[str, Any]) -> float:
    """Accuracy out of distribution."""
    return row["figures"]["test_ood"]["accuracy"]["value"]


def table(models: dict[str, list[dict[str, Any]]]) -> Table:
    """The rows of the report, with 95 % intervals."""
    shown = Table("", "parameters", "validation", *(f"{split} {name}" for split, name in COLUMNS), box=None)
    for kind, rows in models.items():
        for row in rows:
            cells = (row["figures"][split][name] for split, name in COLUMNS)
            texts = (f"{c['value']:.1%} ({c['low']:.1%} to {c['high']:.1%})" for c in cells)
            which = f"dropout {row['dropout']:g}" if kind == "generative" else f"seed {row['seed']}"
            validated = f"{row['validation'][0]:.2%}" if kind == "generative" else ""
            shown.add_row(f"{kind}, {which}", f"{row['parameters']:,}", validated, *texts)
    return shown


def merged(files: list[Path]) -> tuple[dict[str, list[dict[str, Any]]], int, list[dict[str, str]]]:
    """The models, pairs and machines of several results."""
    parts = [json.loads(file.read_text()) for file in files]
    models: dict[str, list[dict[str, Any]]] = {"generative": [], "discriminative": []}
    for part in parts:
        models["generative"] += [part["generative"]] if "generative" in part else []
        models["discriminative"] += part["discriminative"]["seeds"] if "discriminative" in part else []
        for kind, rows in part["others"].items():
            models[kind] += rows
    machines = list({json.dumps(part["machine"]): part["machine"] for part in parts}.values())
    return models, parts[0]["pairs"], machines


def main() -> None:
    """Train what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/shortcut"), help="folder of the models")
    parser.add_argument("--channels", default="64,128", choices=[",".join(map(str, key)) for key in NETWORKS])
    parser.add_argument("--dropout", type=float, default=0.0, help="of the generative one, in training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[62, 63, 64], help="of the baseline")
    parser.add_argument("--steps", type=int, help="of training, for a try")
    parser.add_argument("--limit", type=int, help="pictures of each split, for a try")
    parser.add_argument("--pairs", type=int, default=1024, help="of the plan that the test sets are raced on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("generative", "discriminative"), help="train and measure this one")
    parser.add_argument("--merge", type=Path, nargs="+", help="results to put together, instead of measuring")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shortcut.json"))
    arguments = parser.parse_args()
    models: dict[str, list[dict[str, Any]]] = {"generative": [], "discriminative": []}
    pairs, machines = arguments.pairs, [machine(arguments.device)]
    if arguments.merge:
        models, pairs, machines = merged(arguments.merge)
    else:
        channels = tuple(map(int, arguments.channels.split(",")))
        loop = dataclasses.replace(GENERATIVE.train, steps=arguments.steps or GENERATIVE.train.steps)
        config = dataclasses.replace(GENERATIVE, block_out_channels=channels, dropout=arguments.dropout, train=loop)
        gpu = {} if arguments.device == "cpu" else {"batch_size": 1024, "chunk": 500}
        way = Way(config=config, pairs=pairs, device=arguments.device, limit=arguments.limit, steps=arguments.steps, **gpu)
        if arguments.only != "discriminative":
            models["generative"].append(generative(arguments.work / "generative", way))
        if arguments.only != "generative":
            for seed in arguments.seeds:
                models["discriminative"].append(discriminative(arguments.work / f"discriminative-{seed}", seed, way))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document(models, pairs, machines), indent=2) + "\n")
    Console(width=200).print(table(models))


if __name__ == "__main__":
    main()
