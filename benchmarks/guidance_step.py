"""What x0-detached guidance costs: step time with it / (step time without + one energy forward and backward).

    python benchmarks/guidance_step.py [--rounds 20] [--batch 16] [--out benchmarks/results/guidance_step.json]

The three are timed in turn within each round (so a change of the machine's speed hits all alike), and the ratio is taken of the
medians. An energy is what the guidance sees: the classifier for a pixel-space model, decoder and classifier for a latent one.
"Weight 0" is a guidance of scale 0: its ratio is to the plain step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from rich.console import Console
from rich.table import Table

from genkit.classifiers import load_classifier
from genkit.guidance import ClassifierEnergy, ClassifierGuidance, Guidance
from genkit.pipelines import GuidedPipeline

STEPS = 4  # of each timed run; the time of a step is a quarter of it


def pixel_pipeline() -> GuidedPipeline:
    """An untrained 32 x 32 pixel-space UNet of 9 M parameters: time does not depend on the weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(64, 128, 128), norm_num_groups=16, layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return GuidedPipeline.from_pipe(DDPMPipeline(unet.eval().requires_grad_(False), DDIMScheduler(clip_sample=False)))


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(pipe: GuidedPipeline, inputs: dict[str, Any], batch: int, rounds: int) -> dict[str, float]:
    """Medians of the step times, and the ratios."""
    pipe.set_progress_bar_config(disable=True)
    network = load_classifier("digits-classifier").to(pipe.device)
    energy = ClassifierEnergy(network, 7)
    z = torch.randn(batch, *pipe.denoiser.latent_shape(None, None), device=pipe.device)

    def run(guidance: Guidance | None) -> None:
        pipe(**inputs, seeds=list(range(batch)), num_inference_steps=STEPS, guidance=guidance, output_type="latent")

    def evaluate() -> None:
        for _ in range(STEPS):
            leaf = z.clone().requires_grad_(True)
            torch.autograd.grad(energy(pipe.denoiser.decode(leaf)).sum(), leaf)

    cases = {
        "plain": lambda: run(None),
        "zero": lambda: run(ClassifierGuidance(network, 7, 0.0)),
        "guided": lambda: run(ClassifierGuidance(network, 7)),
        "energy": evaluate,
    }
    for case in cases.values():
        case()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(seconds(case) / STEPS)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {f"{name}_ms": 1e3 * value for name, value in median.items()} | {
        "guided_ratio": median["guided"] / (median["plain"] + median["energy"]),
        "zero_ratio": median["zero"] / median["plain"],
    }


def main() -> None:
    """Measure both models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/guidance_step.json"))
    arguments = parser.parse_args()
    models = {
        "pixel UNet, 32x32": (pixel_pipeline(), {}),
        "digits, null prompt": (GuidedPipeline.from_pretrained("digits"), {"prompt": ""}),
        "digits, CFG 2": (GuidedPipeline.from_pretrained("digits"), {"prompt": "a seven", "guidance_scale": 2.0}),
    }
    rows = {name: measure(pipe, inputs, arguments.batch, arguments.rounds) for name, (pipe, inputs) in models.items()}
    table = Table("model", "plain ms", "energy ms", "guided ms", "guided / (plain + energy)", "weight 0 / plain", box=None)
    for name, row in rows.items():
        numbers = (f"{row[key]:.1f}" for key in ("plain_ms", "energy_ms", "guided_ms"))
        table.add_row(name, *numbers, f"{row['guided_ratio']:.3f}", f"{row['zero_ratio']:.3f}")
    Console().print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine, "batch": arguments.batch, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
