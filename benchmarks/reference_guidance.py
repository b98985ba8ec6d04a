"""Reference behaviour to beat: the same guidance written the way the methods' published code has it, and genkit's, side by side.

    python benchmarks/reference_guidance.py [--rounds 10] [--batch 16] [--out benchmarks/results/reference_guidance.json]

*Discriminator guidance*: the reference differentiates an unfrozen network whose blocks are gradient-checkpointed (which evaluates
each twice and, as its weights are trainable, computes their gradients too), through a clipped sigmoid and a logarithm; genkit a
frozen network's raw logit. "paper's size" is the 46 M + 3 M parameter network for 32 x 32 pixels, untrained: time does not depend
on the weights. *Classifier guidance*: an unfrozen classifier, with a full backward pass, or with one to the picture alone.
*Through the denoiser*: a pass of the UNet for the prediction and a second one for the gradient; genkit differentiates the one
that it makes.

Both sides of a row compute the same numbers, to 1e-5, which is asserted. They are timed in turn within each round, and the ratio
is taken of the medians. The last line is what discriminator guidance costs on the embedded model: a guided step over a plain one,
batch 64, without classifier-free guidance.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genkit.classifiers import load_classifier
from genkit.data import digits
from genkit.guidance import (
    ClassifierEnergy,
    Discriminator,
    DiscriminatorGuidance,
    EnergyGuidance,
    Guidance,
    Predict,
    State,
    load_discriminator,
)
from genkit.guidance.base import differentiate
from genkit.guidance.discriminator import ADM
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline
from genkit.prediction import Prediction

STEPS = 4  # of each timed run; the time of a step is a quarter of it
COST_BATCH = 64
TOLERANCE = 1e-5
CLIP = 1e-5  # of the published discriminator's sigmoid


class Case(NamedTuple):
    """Two ways to compute the same tensor, and by how much to divide their times."""

    reference: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    count: int = 1


class FullBackward(DiscriminatorGuidance):
    """Discriminator guidance of an unfrozen network, by a backward pass to everything that is trainable."""

    def __init__(self, network: Any) -> None:
        super().__init__(network, clip=CLIP)
        network.requires_grad_(True)

    def joint(self, state: State) -> None:
        """Evaluated on its own."""

    def gradient(self, state: State, prediction: Prediction) -> Tensor:
        return full_backward(lambda x: self._value(x, state), state.x)


class SecondPass(EnergyGuidance):
    """Through the denoiser with a pass for the prediction and one for the gradient."""

    def __call__(self, state: State, predict: Predict) -> Prediction:
        prediction = predict()
        c = self.shift(state, predict(grad=True))
        assert c is not None
        return prediction.shifted(c)


def unfrozen(network: nn.Module) -> Any:
    """A copy whose weights are trainable."""
    return copy.deepcopy(network).requires_grad_(True)


def checkpointed(discriminator: Discriminator) -> Any:
    """An unfrozen copy, each block of which is evaluated again in the backward pass."""
    network = unfrozen(discriminator)
    encoders = [encoder for encoder in (network.extractor, network.head) if encoder is not None]
    for block in (block for encoder in encoders for block in encoder.blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=True)
    return network


def clipped(ratio: Tensor) -> Tensor:
    """The log-ratio (B,) through a clipped sigmoid, as its gradient is taken in the published code."""
    d = torch.sigmoid(ratio).clamp(CLIP, 1 - CLIP)
    return torch.log(d / (1 - d))


def full_backward(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient at x by a backward pass to everything that is trainable."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        energy(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def to_picture(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient at x alone."""
    leaf = x.detach().clone().requires_grad_(True)
    return torch.autograd.grad(energy(leaf).sum(), leaf)[0]


def sampler(pipe: GuidedPipeline, batch: int) -> Callable[[Guidance | None], Tensor]:
    """A short run of the embedded model, without classifier-free guidance."""
    captions = digits.draw("test", batch, seed=0).captions()

    def run(guidance: Guidance | None) -> Tensor:
        return pipe(
            captions,
            seeds=list(range(batch)),
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            guidance=guidance,
            output_type="latent",
        ).images

    return run


def log_probability(network: Any, target: int) -> Callable[[Tensor], Tensor]:
    """log p(target | images) of a network as it is, frozen or not (`ClassifierEnergy` freezes it while it runs)."""
    return lambda images: network(images).log_softmax(1)[:, target]


def cases(pipe: GuidedPipeline, batch: int) -> dict[str, Case]:
    """The rows of the table."""
    generator = torch.Generator().manual_seed(0)
    discriminator = load_discriminator("digits-discriminator")
    reference = checkpointed(discriminator)
    slow = FullBackward(checkpointed(discriminator))
    run, level = sampler(pipe, batch), Level(1.0, 1.0, 0.0)
    cond = pipe.denoiser.condition(prompts=digits.draw("test", batch, seed=0).captions())
    z = 2**0.5 * torch.randn(batch, *pipe.denoiser.latent_shape(None, None), generator=generator)

    torch.manual_seed(0)
    large = Discriminator(**ADM["pixels 32"]).eval().requires_grad_(False)
    large_reference = checkpointed(large)
    pixels = 2**0.5 * torch.randn(max(1, batch // 4), 3, 32, 32, generator=generator)

    classifier = load_classifier("digits-classifier")
    trainable, images = unfrozen(classifier), torch.rand(batch, 3, 32, 32, generator=generator) * 2 - 1
    frozen_energy = ClassifierEnergy(classifier, 7)

    def through(energy: Callable[[Tensor], Tensor], space: str) -> Case:
        arguments = (energy, 0.1, "through_denoiser", space)
        return Case(lambda: run(SecondPass(*arguments)), lambda: run(EnergyGuidance(*arguments)), STEPS)

    return {
        "discriminator, gradient": Case(
            lambda: full_backward(lambda x: clipped(reference(x, level, cond)), z),
            lambda: differentiate(lambda x: discriminator(x, level, cond), z)[1],
        ),
        "discriminator, gradient, paper's size": Case(
            lambda: full_backward(lambda x: clipped(large_reference(x, level)), pixels),
            lambda: differentiate(lambda x: large(x, level), pixels)[1],
        ),
        "discriminator, step": Case(
            lambda: run(slow),
            lambda: run(DiscriminatorGuidance(discriminator)),
            STEPS,
        ),
        "classifier, gradient, full backward": Case(
            lambda: full_backward(log_probability(trainable, 7), images), lambda: frozen_energy.gradient(images)
        ),
        "classifier, gradient, to the picture": Case(
            lambda: to_picture(log_probability(trainable, 7), images), lambda: frozen_energy.gradient(images)
        ),
        "through the denoiser, latent energy, step": through(lambda z: -z.square().mean((1, 2, 3)), "latent"),
        "through the denoiser, classifier, step": through(frozen_energy, "image"),
    }  # fmt: skip


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each in milliseconds, timed in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(1e3 * seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(name: str, case: Case, rounds: int) -> dict[str, float]:
    """Times of both sides of a row, after a check (which also warms up) that they agree.

    Raises:
        AssertionError: they do not.
    """
    reference, ours = case.reference(), case.ours()
    difference = (reference - ours).abs().max().item() / max(1e-12, ours.abs().max().item())
    assert difference <= TOLERANCE, f"{name}: the two differ by {difference:.2e} of the largest value"
    median = medians({"reference": case.reference, "ours": case.ours}, rounds)
    row = {f"{side}_ms": value / case.count for side, value in median.items()}
    return row | {"reference_over_ours": median["reference"] / median["ours"], "difference": difference}


def step_cost(pipe: GuidedPipeline, rounds: int) -> dict[str, float]:
    """A step with discriminator guidance over a plain one."""
    run, guidance = sampler(pipe, COST_BATCH), DiscriminatorGuidance(load_discriminator("digits-discriminator"))
    sides: dict[str, Callable[[], Any]] = {"plain": lambda: run(None), "guided": lambda: run(guidance)}
    for side in sides.values():
        side()
    median = medians(sides, rounds)
    return {f"{side}_ms": value / STEPS for side, value in median.items()} | {
        "guided_over_plain": median["guided"] / median["plain"]
    }


def main() -> None:
    """Measure every row, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reference_guidance.json"))
    arguments = parser.parse_args()
    pipe = GuidedPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    rows = {name: compare(name, case, arguments.rounds) for name, case in cases(pipe, arguments.batch).items()}
    cost = step_cost(pipe, arguments.rounds)
    console, table = Console(), Table("", "reference ms", "genkit ms", "reference / genkit", "difference", box=None)
    for name, row in rows.items():
        numbers = (
            f"{row['reference_ms']:.1f}",
            f"{row['ours_ms']:.1f}",
            f"{row['reference_over_ours']:.2f}",
            f"{row['difference']:.0e}",
        )
        table.add_row(name, *numbers)
    console.print(table)
    console.print(
        f"digits, batch {COST_BATCH}, no classifier-free guidance: a step with discriminator guidance {cost['guided_ms']:.0f} ms / "
        f"plain {cost['plain_ms']:.0f} ms = {cost['guided_over_plain']:.2f}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    document = {"machine": machine, "batch": arguments.batch, "rows": rows, f"step cost, batch {COST_BATCH}": cost}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
