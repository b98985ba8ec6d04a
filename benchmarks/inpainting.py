"""A student that paints into masks: the lower half of held-out real digits, painted anew.

    python benchmarks/inpainting.py FOLDER [--count 1000] [--picture FILE] [--out FILE]

FOLDER is what `genkit export` made of a run with `--task inpaint`. The student is sampled by diffusers' own pipeline and is told
caption and upper half; what it was given is pasted back, so the upper half is exact. `digits-judge`, which trained nothing, reads
the pictures.

    digit, ink, paper   share of pictures that the judge reads as the caption says
    frechet             distance of the judge's features to those of the digits themselves
    seam                mean difference of the two rows where the halves meet, over that of the digits themselves; 1 is seamless

For comparison: the lower half after the autoencoder alone, which no latent model beats; and `digits-turbo` in the same pipeline,
which puts the upper half, with noise, in its sample before each step, so that it need not be trained for it.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor
from turbo import Results, fingerprint

from genkit import zoo
from genkit.data.digits import LABELS, DigitBatch
from genkit.distill.masks import lower_half
from genkit.distill.spec import FewStepSpec
from genkit.images import contact_sheet, save_png
from genkit.latents import LatentCodec
from genkit.metrics.frechet import frechet_distance
from genkit.zoo import quality

TURBO = "digits-turbo"
SHOWN, SEEDS = 8, (0, 1, 2, 3)  # digits of the picture, and completions of each
Painter = Callable[[Tensor, list[str], list[int]], Tensor]  # pictures (B, 3, H, W) in [-1, 1], captions, seeds -> pictures


def load(folder: Path) -> StableDiffusionInpaintPipeline:
    """The stock pipeline of a folder."""
    pipe = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painter(pipe: StableDiffusionInpaintPipeline, steps: int) -> Painter:
    """Paints the lower half in a number of steps."""

    def paint(pictures: Tensor, captions: list[str], seeds: list[int]) -> Tensor:
        mask = lower_half(len(pictures), pictures.shape[-2:])
        drawn = pipe(
            captions, image=pictures / 2 + 0.5, mask_image=mask, num_inference_steps=steps, guidance_scale=1.0, strength=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt",
        ).images  # fmt: skip
        return mask * (2 * drawn - 1) + (1 - mask) * pictures

    return paint


def autoencoder(pipe: StableDiffusionInpaintPipeline) -> Painter:
    """The lower half as the autoencoder gives it back."""
    codec = LatentCodec.from_vae(pipe.vae)

    @torch.no_grad()
    def paint(pictures: Tensor, captions: list[str], seeds: list[int]) -> Tensor:
        mask = lower_half(len(pictures), pictures.shape[-2:])
        return mask * codec.decode(codec.encode(pictures)).clamp(-1, 1) + (1 - mask) * pictures

    return paint


def jump(pictures: Tensor) -> float:
    """Mean difference of the rows above and below the middle."""
    half = pictures.shape[-2] // 2
    return (pictures[:, :, half] - pictures[:, :, half - 1]).abs().mean().item()


def measure(paint: Painter, truth: DigitBatch) -> dict[str, float]:
    """The figures of a row."""
    captions, count = truth.captions(), len(truth.images)
    parts = [
        paint(truth.images[rows], captions[rows], list(range(count))[rows])
        for rows in (slice(i, i + 100) for i in range(0, count, 100))
    ]
    painted, judge = torch.cat(parts), quality.load_judge()
    read, features = quality.judged(judge, painted)
    _, real = quality.judged(judge, truth.images)
    accuracy = {name: (read[name] == getattr(truth, name)).float().mean().item() for name in LABELS}
    return accuracy | {"frechet": frechet_distance(features, real), "seam": jump(painted) / jump(truth.images)}


def draw(paint: Painter, file: Path) -> None:
    """A picture: digits, what the student gets, and what it paints."""
    truth = quality.held_out(1000)
    rows = [int((truth.digit == digit).nonzero()[1]) for digit in range(2, 2 + SHOWN)]
    pictures, captions = truth.images[rows], [truth.captions()[row] for row in rows]
    given = pictures * (1 - lower_half(SHOWN, pictures.shape[-2:]))
    shown = {"digit": pictures, "given": given}
    shown |= {f"painted, seed {seed}": paint(pictures, captions, [1000 * seed + i for i in range(SHOWN)]) for seed in SEEDS}
    sheet = [StableDiffusionInpaintPipeline.numpy_to_pil((x / 2 + 0.5).permute(0, 2, 3, 1).numpy()) for x in shown.values()]
    save_png(contact_sheet(sheet, list(shown), captions), file)


def main() -> None:
    """Measure what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="folder of an exported inpainting student of digits")
    parser.add_argument("--count", type=int, default=1000, help="digits")
    parser.add_argument("--picture", type=Path, help="PNG file for pictures in 4 steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/inpainting.json"))
    arguments = parser.parse_args()
    spec = FewStepSpec.load(arguments.student)
    if spec is None or spec.task != "inpaint":
        parser.error(f"{str(arguments.student)!r} is no exported inpainting student.")
    student, turbo = load(arguments.student), load(zoo.path(TURBO))
    rows: dict[str, tuple[str, Painter]] = {"autoencoder": (fingerprint(TURBO), autoencoder(turbo))}
    for name, pipe, model in ((TURBO, turbo, TURBO), ("student", student, str(arguments.student))):
        for steps in (1, 2, 4):
            rows[f"{name}, {steps} step{'s' * (steps > 1)}"] = (fingerprint(model), painter(pipe, steps))

    results, truth = Results(arguments.out), quality.held_out(arguments.count)
    table = Table("", *LABELS, "frechet", "seam", box=None)
    for name, (model, paint) in rows.items():
        key = {"model": model, "count": arguments.count}
        row = results.row("lower half", name, key, functools.partial(measure, paint, truth))
        table.add_row(name, *(f"{row[column]:.4g}" for column in (*LABELS, "frechet", "seam")))
    Console(width=120).print(table)
    if arguments.picture is not None:
        draw(painter(student, 4), arguments.picture)


if __name__ == "__main__":
    main()
