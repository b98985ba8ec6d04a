"""Where `digits` looks at the words of its prompt, and what recording that costs.

    python benchmarks/heatmaps.py [--count 100] [--rounds 5] [--out benchmarks/results/heatmaps.json] [--picture docs/heatmaps.png]

Captions of held-out digits, 30 steps, CFG 2. A place of the latents is stroke as far as its pixels differ from the picture's
border, and paper for the rest; the figure is the mean attention to a word on the stroke over that on the paper: above 1 the word is
looked at from the stroke, below 1 from the paper. Recording is timed against plain sampling in turn (CPU time on a CPU, medians).
The picture is the overlay of one prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from genkit.attention import ImageMaps, measure_sharpness, overlay, record
from genkit.files import write_atomic
from genkit.images import save_png
from genkit.measuring import seconds
from genkit.pipelines import GuidedPipeline
from genkit.zoo import quality

PROMPT = "a red seven on a yellow background"
SHOWN = ["red", "seven", "yellow", "background"]
STEPS, CFG, BATCH = 30, 2.0, 50


def stroke(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of stroke (B, h, w) in each place of a grid, of images (B, 3, H, W) in [0, 1]."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2).median(2).values
    away = (images - border[:, :, None, None]).abs().amax(1, keepdim=True) > 0.25
    return F.interpolate(away.float(), size=grid, mode="area")[:, 0]


def ratio(heat: Tensor, share: Tensor) -> float:
    """Mean of a map (h, w) on the stroke / on the paper."""
    return float((heat * share).sum() / share.sum() / ((heat * (1 - share)).sum() / (1 - share).sum()))


def roles(prompt: str) -> dict[str, str]:
    """Which word of "a red seven on a yellow background" is which."""
    words = prompt.split()
    return {"ink": words[1], "digit": words[2], "paper": words[5], '"background"': words[6]}


def measure_places(pipe: GuidedPipeline, count: int) -> dict[str, dict[str, float]]:
    """Geometric means of the ratios, by role, in all layers' mean and in the last layer."""
    prompts = quality.held_out(count).captions()
    logs: dict[str, dict[str, list[float]]] = {"all layers": {}, "last layer": {}}
    for start in range(0, count, BATCH):
        part = prompts[start : start + BATCH]
        seeds = list(range(start, start + len(part)))
        with record(pipe) as maps:
            images = pipe(part, seeds=seeds, num_inference_steps=STEPS, guidance_scale=CFG, output_type="pt").images
        for i, image in enumerate(maps):
            share = stroke(images[i : i + 1], tuple(image.mean.shape[1:]))[0]
            if not 0 < float(share.sum()) < share.numel():
                continue
            for role, word in roles(part[i]).items():
                for where, heat in (("all layers", image.of(word)), ("last layer", image.of(word, layer=list(image.layers)[-1]))):
                    logs[where].setdefault(role, []).append(ratio(heat, share))
    return {where: {role: statistics.geometric_mean(values) for role, values in rows.items()} for where, rows in logs.items()}


def measure_cost(pipe: GuidedPipeline, rounds: int) -> dict[str, float]:
    """Time of a run that is recorded / plain, for 16 pictures."""

    def draw() -> None:
        pipe(PROMPT, seeds=list(range(16)), num_inference_steps=4, guidance_scale=CFG, output_type="latent")

    def recorded() -> None:
        with record(pipe):
            draw()

    def measured() -> None:
        with measure_sharpness(pipe):
            draw()

    cases = {"plain": draw, "heat maps": recorded, "entropy": measured}
    times: dict[str, list[float]] = {name: [] for name in cases}
    draw()
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(seconds(case))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {f"{name} / plain": value / median["plain"] for name, value in median.items() if name != "plain"}


def picture(pipe: GuidedPipeline) -> Any:
    with record(pipe, SHOWN) as maps:
        images = pipe(PROMPT, seeds=[0], num_inference_steps=STEPS, guidance_scale=CFG).images
    first: ImageMaps = maps[0]
    return overlay.sheet(images[0], first)


def main() -> None:
    """Measure, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/heatmaps.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/heatmaps.png"))
    arguments = parser.parse_args()
    pipe = GuidedPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    save_png(picture(pipe), arguments.picture)
    cost, places = measure_cost(pipe, arguments.rounds), measure_places(pipe, arguments.count)
    table = Table("stroke / paper", *next(iter(places.values())), box=None)
    for where, row in places.items():
        table.add_row(where, *(f"{value:.2f}" for value in row.values()))
    Console().print(table, cost)
    machine = {"device": f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__, "python": platform.python_version()}
    document = {"machine": machine, "count": arguments.count, "places": places, "cost": cost}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out, (json.dumps(document, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
