"""Class tokens on `digits`: do they work, and what does training them cost?

    python benchmarks/class_tokens.py [--classes seven,four,zero] [--rounds 8] [--out benchmarks/results/class_tokens.json]

*Effect*: a token for each class, from prompts that do not name it; `digits-classifier` guides, `digits-judge` reads pictures of
seeds that were not trained on. *Cost*: an update beside plain sampling of as many images (same steps, guidance scale and batch),
and beside an update as the method's published code does it: images one by one with accumulated gradients, gradients for the whole
embedding matrix and for the classifier's weights, gradient checkpointing. The three are timed in turn within each round.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit import noise
from genkit.classifiers import load_classifier
from genkit.data import digits
from genkit.guidance import ClassifierEnergy
from genkit.guidance.training import TokenConfig, TokenTrainer
from genkit.images import contact_sheet, save_png
from genkit.pipelines import GuidedPipeline
from genkit.sampling import sample
from genkit.zoo.quality import judged, load_judge

INK = "red"
PROMPT = "a red {token}"
CONFIG = TokenConfig(prompts=(PROMPT,), init="digit")
FIRST_SEED, SEEDS, MORE_SEEDS = 5_000, 10, 50


def pipeline() -> GuidedPipeline:
    pipe = GuidedPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: GuidedPipeline, prompt: str, count: int) -> Tensor:
    """Images (count, 3, 32, 32) in [-1, 1] of new seeds, 30 steps."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + count))
    images = pipe([prompt] * count, seeds=seeds, num_inference_steps=30, guidance_scale=CONFIG.cfg, output_type="pt").images
    return images * 2 - 1


def effect(classes: list[str], folder: Path) -> dict[str, Any]:
    """Train a token for each class in one run; the judge's reading of new seeds."""
    pipe, guide, judge = pipeline(), load_classifier("digits-classifier"), load_judge()
    names = {f"my-{name}": name for name in classes}
    trainer = TokenTrainer(pipe, {token: ClassifierEnergy(guide, name) for token, name in names.items()}, CONFIG)
    began = time.perf_counter()
    trained = trainer.train()
    seconds = (time.perf_counter() - began) / len(classes)
    folder.mkdir(parents=True, exist_ok=True)
    rows, pictures = {}, [draw(pipe, PROMPT.replace("{token}", CONFIG.init), SEEDS)]
    for token, name in names.items():
        trained[token].save(folder / f"{token}.safetensors", {"class": name})
        pipe.load_tokens(folder / f"{token}.safetensors")
        images = draw(pipe, PROMPT.replace("{token}", trained[token].token), MORE_SEEDS)
        read, _ = judged(judge, images)
        digit = (read["digit"] == digits.LABELS["digit"].index(name)).float()
        ink = (read["ink"] == digits.LABELS["ink"].index(INK)).float()
        before, _ = judged(judge, draw(pipe, PROMPT.replace("{token}", CONFIG.init), MORE_SEEDS))
        rows[name] = {
            "digit_before": (before["digit"] == digits.LABELS["digit"].index(name)).float().mean().item(),
            f"digit_{SEEDS}_seeds": digit[:SEEDS].mean().item(),
            f"digit_{MORE_SEEDS}_seeds": digit.mean().item(),
            f"ink_{SEEDS}_seeds": ink[:SEEDS].mean().item(),
            f"ink_{MORE_SEEDS}_seeds": ink.mean().item(),
            "updates": trained[token].updates,
            "finished": trained[token].finished,
            "seconds_a_class": seconds,
            "bytes": (folder / f"{token}.safetensors").stat().st_size,
        }
        pictures.append(images[:SEEDS])
    to_pil = pipe.host.image_processor.postprocess
    sheet = contact_sheet(
        [to_pil(row, output_type="pil") for row in pictures],
        [f"start: {CONFIG.init}", *classes],
        [f"seed {FIRST_SEED + i}" for i in range(SEEDS)],
    )
    save_png(sheet, folder / "class_tokens.png")
    return rows


def published_update(pipe: GuidedPipeline, classifier: Any, target: int, config: TokenConfig) -> Callable[[], None]:
    """An update as the published code does it (on genkit's sampler), in `pipe`, whose embedding matrix it trains."""
    weight = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    row = pipe.tokenizer("digit", add_special_tokens=False)["input_ids"][0]
    others = torch.arange(len(weight)) != row
    optimizer = torch.optim.AdamW([weight], lr=0.00125, weight_decay=0.01)
    pipe.unet.enable_gradient_checkpointing()
    denoiser, scheduler = pipe.denoiser, pipe.scheduler
    shape = denoiser.latent_shape(None, None)
    prompt = config.prompts[0].replace("{token}", "digit")

    def update() -> None:
        for seed in range(config.batch):
            generator = noise.generators([seed], noise.TRAINING)
            denoiser.set_timesteps(scheduler, config.steps, shape, denoiser.device)
            x = noise.normal([seed], shape) * scheduler.init_noise_sigma
            cond = denoiser.condition(prompt, grad=True)
            arguments = {"generator": generator, "grad_evaluations": config.evaluations}
            x0 = sample(denoiser, scheduler, x, cond, guidance_scale=config.cfg, **arguments)
            loss = F.cross_entropy(classifier(denoiser.decode(x0)), torch.tensor([target])) / config.batch
            loss.backward()
        weight.grad[others] = 0
        torch.nn.utils.clip_grad_norm_([weight], config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return update


def cost(batch: int, classes: list[str], rounds: int, *, published: bool) -> dict[str, float]:
    """Medians of the times, and their ratios."""
    pipe, guide = pipeline(), load_classifier("digits-classifier")
    config = dataclasses.replace(CONFIG, batch=batch, threshold=None, patience=10_000, updates=10_000)
    trainer = TokenTrainer(pipe, {f"my-{name}": ClassifierEnergy(guide, name) for name in classes}, config)
    count = batch * len(classes)
    prompts, seeds = [PROMPT.replace("{token}", config.init)] * count, list(range(count))

    def plain() -> None:
        pipe(prompts, seeds=seeds, num_inference_steps=config.steps, guidance_scale=config.cfg, output_type="pt")

    cases: dict[str, Callable[[], Any]] = {"plain": plain, "update": trainer.step}
    if published:
        trainable = copy.deepcopy(guide).requires_grad_(True)
        cases["published"] = published_update(pipeline(), trainable, 7, config)
    times: dict[str, list[float]] = {name: [] for name in cases}
    with trainer.prepared():
        for i in range(rounds + 1):
            for name, case in cases.items():
                began = time.perf_counter()
                case()
                if i:  # the first round warms up
                    times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in times.items()}
    row = {f"{name}_seconds": value for name, value in median.items()}
    row["update_over_plain"] = median["update"] / median["plain"]
    if published:
        row["published_over_update"] = median["published"] / median["update"]
    return row


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="seven,four,zero")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=Path, default=Path("out/class_tokens"), help="folder for the tokens and their pictures")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/class_tokens.json"))
    arguments = parser.parse_args()
    classes = arguments.classes.split(",")
    console = Console()

    costs = {
        f"{len(classes)} classes x {CONFIG.batch} images": cost(CONFIG.batch, classes, arguments.rounds, published=False),
        "1 class x 5 images": cost(5, classes[:1], arguments.rounds, published=True),
    }
    table = Table("update", "plain s", "ours s", "published s", "ours / plain", "published / ours", box=None)
    for name, row in costs.items():
        keys = ("plain_seconds", "update_seconds", "published_seconds", "update_over_plain", "published_over_update")
        table.add_row(name, *(f"{row[key]:.2f}" if key in row else "" for key in keys))
    console.print(table)

    effects = effect(classes, arguments.tokens)
    table = Table(
        "class", "before", f"digit, {SEEDS} seeds", f"{MORE_SEEDS} seeds", "ink", "updates", "s / class", "bytes", box=None
    )
    for name, row in effects.items():
        shares = (
            row["digit_before"],
            row[f"digit_{SEEDS}_seeds"],
            row[f"digit_{MORE_SEEDS}_seeds"],
            row[f"ink_{MORE_SEEDS}_seeds"],
        )
        figures = (str(row["updates"]), f"{row['seconds_a_class']:.0f}", str(row["bytes"]))
        table.add_row(name, *(f"{share:.0%}" for share in shares), *figures)
    console.print(table)
    device = f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    document = {"machine": machine, "settings": dataclasses.asdict(CONFIG), "cost": costs, "effect": effects}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
