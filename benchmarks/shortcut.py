"""Shortcuts: a generative classifier against a discriminative one of the same size, where the ink tells the digit in training only.

    python benchmarks/shortcut.py [--generative DIR] [--discriminative DIR] [--pairs 1024] [--out benchmarks/results/shortcut.json]

Both see the same 3,600 pictures of `genkit.data.shortcut`, without augmentation, and the weights of both are chosen on the same
in-distribution validation pictures. A folder that holds no finished model is trained into first, an interrupted run goes on. The
generative one is what `genkit train classifier-diffusion --channels 64,128 --times logit-normal:0,1 --steps 6500 --batch 128
--no-bf16` makes. Its label is argmin_y of the mean diffusion loss, all classes on the same pairs of noise level and noise; classes
are equally frequent. Which part of the noise levels counts (one of `SPANS`) is what is best in validation; the test sets are then
raced. Losses and answers are kept in its folder, so a run can be interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
CHUNK = 50  # pictures whose answers are kept together
REPORTED = ("test_ood", "test_id")
COLUMNS = (
    ("test_id", "accuracy"), ("test_id", "worst_group"), ("test_ood", "accuracy"), ("test_ood", "class_balanced"),
    ("test_ood", "worst_group"),
)  # fmt: skip
GENERATIVE = ClassConditionalConfig(
    block_out_channels=(64, 128), times="logit-normal:0,1", train=dataclasses.replace(TRAIN, steps=6500, batch_size=128, bf16=False)
)
# As many parameters as the generative one to within 2 %: a residual network of eight blocks.
NETWORK: dict[str, Any] = {"block_out_channels": (40, 80, 168, 328), "layers_per_block": 2}
DISCRIMINATIVE = TrainConfig(
    steps=3000, batch_size=64, lr=1e-3, warmup=100, ema_decay=0.99, seed=62, validate_every=57, patience=10
)  # a validation an epoch


def train_generative(folder: Path, device: str) -> None:
    """Train the generative classifier from labelled folders, as the command does."""
    data = folder / "data"
    if not data.exists():
        shortcut.write(data, splits=("train", "val"))
    train_class_conditional(
        open_source(data / "train"), folder, GENERATIVE, validation=open_source(data / "val"), resume=True, device=device
    )


def train_discriminative(folder: Path, device: str) -> None:
    """Train the baseline by cross-entropy, with early stopping on validation accuracy."""
    train, val = shortcut.load("train"), shortcut.load("val")
    torch.manual_seed(DISCRIMINATIVE.seed)
    model = AttributeClassifier(labels={"digit": list(shortcut.CLASSES)}, **NETWORK)

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(train), (DISCRIMINATIVE.batch_size,), generator=generator)
        return F.cross_entropy(model(train.images[rows].to(device)).float(), train.digit[rows].to(device))

    def validate(model: Any) -> dict[str, float]:
        logits = torch.cat([model(part.to(device)).float().cpu() for part in val.images.split(100)])
        errors = (logits.argmax(1) != val.digit).float().mean().item()
        # Accuracy decides, as in the paper; of equals the lower cross-entropy.
        return {"loss": errors + 1e-3 * F.cross_entropy(logits, val.digit).item(), "errors": errors}

    best = fit(
        model, loss, DISCRIMINATIVE, folder / "training", name="discriminative", resume=True, device=device, validate=validate
    )
    best.to("cpu").save_pretrained(folder)


def validation_losses(folder: Path, split: str, device: str) -> np.ndarray:
    """Losses (N, K, T) of all pictures of a split and all classes on the pairs of `WHOLE`; kept in the folder."""
    file = folder / "losses" / f"{split}.npy"
    if not file.exists():
        denoiser = load(str(folder), device=device).denoiser
        scorer = Scorer(denoiser, PairPlan(count=VALIDATION_PAIRS, span=WHOLE))
        cond = denoiser.condition(prompts=list(shortcut.CLASSES))
        tables = []
        with progress() as bar:
            images = shortcut.load(split).images
            task = bar.add_task(f"losses of {split}", total=len(images))
            for part in images.split(20):
                with torch.no_grad():
                    latents = denoiser.encode(part.to(device))
                tables.append(scorer.table(latents, cond).float())
                bar.update(task, advance=len(part))
        file.parent.mkdir(exist_ok=True)
        np.save(file, torch.cat(tables).numpy())
    return np.load(file)


def choose_span(folder: Path, device: str) -> tuple[tuple[float, float], dict[str, float]]:
    """The span of the best accuracy in distribution, and the accuracy of each.

    Of the validation pictures 95 % agree with their ink, and nearly all of these are right whatever the span; what differs are the
    rest, 20 of 400. So the two strata are estimated apart: pictures that agree from "val", and those that do not from "val_rare".
    """
    agreeing, rare = shortcut.load("val").agrees.numpy(), shortcut.load("val_rare")
    truth = [shortcut.load("val").digit.numpy(), rare.digit.numpy()]
    losses = [validation_losses(folder, split, device) for split in ("val", "val_rare")]
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
    return max(choices)[2], {f"{span[0]} to {span[1]}": right for right, _, span in choices}


def _stratified(values: list[np.ndarray], agreeing: np.ndarray) -> float:
    """The mean in distribution of values of "val" and "val_rare"."""
    return shortcut.AGREEMENT * float(values[0][agreeing].mean()) + (1 - shortcut.AGREEMENT) * float(values[1].mean())


def raced(folder: Path, split: str, span: tuple[float, float], pairs: int, device: str) -> tuple[np.ndarray, float]:
    """Predicted labels (N,) of a split, and evaluations a picture; answers are kept in the folder."""
    pipe = None
    labels, evaluations = [], []
    images = shortcut.load(split).images
    with progress() as bar:
        task = bar.add_task(f"race of {split}", total=len(images))
        for start in range(0, len(images), CHUNK):
            file = folder / "losses" / f"{split}-{span[0]}-{span[1]}-{pairs}-{start}.json"
            if not file.exists():
                if pipe is None:
                    pipe = DiffusionClassifierPipeline.from_pretrained(folder).to(device)
                    pipe.set_progress_bar_config(disable=True)
                out = pipe(
                    images[start : start + CHUNK], prompts={name: name for name in shortcut.CLASSES}, policy="race",
                    plan=PairPlan(count=pairs, span=span),
                )  # fmt: skip
                answers = {"labels": [shortcut.CLASSES.index(label) for label in out.labels], "evaluations": out.evaluations}
                write_atomic(file, json.dumps(answers).encode())
            answers = json.loads(file.read_text())
            labels += answers["labels"]
            evaluations += answers["evaluations"]
            bar.update(task, completed=len(labels))
    return np.array(labels), float(np.mean(evaluations))


def generative_labels(folder: Path, pairs: int, device: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Predicted labels (N,) by split, and how they were found."""
    span, validated = choose_span(folder, device)
    labels, evaluations = {}, {}
    for split in REPORTED:
        labels[split], evaluations[split] = raced(folder, split, span, pairs, device)
    return labels, {"span": span, "evaluations_per_picture": evaluations, "validation_accuracy": validated}


@torch.no_grad()
def discriminative_labels(folder: Path, device: str) -> dict[str, np.ndarray]:
    """Predicted labels (N,) by split."""
    model = load_classifier(str(folder)).to(device)
    return {
        split: torch.cat([model(part.to(device)).argmax(1).cpu() for part in shortcut.load(split).images.split(100)]).numpy()
        for split in REPORTED
    }


def figures(labels: dict[str, np.ndarray]) -> dict[str, Any]:
    """The accuracies of one classifier."""
    found: dict[str, Any] = {}
    for split, predicted in labels.items():
        batch = shortcut.load(split)
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


def table(document: dict[str, Any]) -> Table:
    """The rows of the report, with 95 % intervals."""
    shown = Table("", "parameters", *(f"{split} {name}" for split, name in COLUMNS), box=None)
    for classifier in ("generative", "discriminative"):
        row = document[classifier]
        cells = (row["figures"][split][name] for split, name in COLUMNS)
        texts = (f"{c['value']:.1%} ({c['low']:.1%} to {c['high']:.1%})" for c in cells)
        shown.add_row(classifier, f"{row['parameters']:,}", *texts)
    return shown


def main() -> None:
    """Train what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generative", type=Path, default=Path("runs/shortcut/generative"))
    parser.add_argument("--discriminative", type=Path, default=Path("runs/shortcut/discriminative"))
    parser.add_argument("--pairs", type=int, default=1024, help="of the plan that the test sets are raced on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("generative", "discriminative"), help="train and measure this one, write nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shortcut.json"))
    arguments = parser.parse_args()
    document: dict[str, Any] = {
        "machine": {"device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                    "python": platform.python_version()},
        "pairs": arguments.pairs,
    }  # fmt: skip
    if arguments.only != "discriminative":
        folder = arguments.generative
        if not (folder / "card.json").exists():
            train_generative(folder, arguments.device)
        labels, how = generative_labels(folder, arguments.pairs, arguments.device)
        card = json.loads((folder / "card.json").read_text())
        document["generative"] = {"parameters": card["parameters"], "figures": figures(labels), **how}
    if arguments.only != "generative":
        folder = arguments.discriminative
        if not (folder / "config.json").exists():
            train_discriminative(folder, arguments.device)
        count = sum(p.numel() for p in load_classifier(str(folder)).parameters())
        document["discriminative"] = {"parameters": count, "figures": figures(discriminative_labels(folder, arguments.device))}
    if arguments.only:
        print(json.dumps(document[arguments.only], indent=2))
        return
    ood = (document[name]["figures"]["test_ood"]["accuracy"]["value"] for name in ("generative", "discriminative"))
    document["out_of_distribution_gap"] = next(ood) - next(ood)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    Console(width=200).print(table(document))


if __name__ == "__main__":
    main()
