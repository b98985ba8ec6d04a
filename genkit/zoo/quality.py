"""Measured quality of the embedded models. The cards record these figures, and tests check them again on fewer samples.

Every picture is judged by `digits-judge`, which never guides. Distances are Frechet distances in the judge's features to
held-out real digits; the reference is the distance of 1,000 real training digits to the same pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit import zoo
from genkit.classifiers import AttributeClassifier
from genkit.console import progress
from genkit.data import digits
from genkit.guidance import Guidance
from genkit.metrics.frechet import frechet_distance
from genkit.metrics.manifold import manifold_metrics

SEEDS = 10_000  # picture i of a measurement has seed SEEDS + i


def load_judge() -> AttributeClassifier:
    """`digits-judge`, float32, in eval mode."""
    return AttributeClassifier.from_pretrained(zoo.path("digits-judge"), dtype=torch.float32).eval()


@torch.no_grad()
def judged(judge: AttributeClassifier, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Read attributes (B,) by name, and features (B, D), of images in [-1, 1]."""
    features = torch.cat([judge.features(part) for part in images.split(250)])
    return {name: head(features).argmax(1) for name, head in judge.heads.items()}, features


def generate(pipe: Any, prompts: Sequence[str], *, batch: int = 100, guidance: Any = None, **arguments: Any) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], one for each prompt.

    Args:
        guidance: a guidance, or a function of a slice of the prompts to one (for targets that differ from sample to sample).
    """
    pipe.set_progress_bar_config(disable=True)
    parts = []
    with progress() as bar:
        task = bar.add_task("sampling", total=len(prompts))
        for start in range(0, len(prompts), batch):
            rows = slice(start, min(start + batch, len(prompts)))
            steer = guidance if guidance is None or isinstance(guidance, Guidance) else guidance(rows)
            seeds = range(SEEDS + rows.start, SEEDS + rows.stop)
            out = pipe(list(prompts[rows]), seeds=list(seeds), guidance=steer, output_type="pt", **arguments)
            parts.append(out.images * 2 - 1)
            bar.update(task, completed=rows.stop)
    return torch.cat(parts)


def reference_distances(judge: AttributeClassifier, images: Tensor, count: int = 1000) -> dict[str, float]:
    """Frechet distance of `images` to the real test digits, that of real training digits, and their ratio."""
    test = judged(judge, digits.draw("test", count, seed=0).images)[1]
    real = frechet_distance(judged(judge, digits.draw("train", count, seed=1).images)[1], test)
    ours = frechet_distance(judged(judge, images)[1], test)
    return {"frechet": ours, "frechet_of_real_training_digits": real, "ratio": ours / real}


def held_out(count: int = 2000) -> digits.DigitBatch:
    """Held-out real digits: each of the 1,000 once in each thousand, in other colours."""
    parts = [digits.draw("test", min(1000, count - start), seed=start // 1000) for start in range(0, count, 1000)]
    fields = [field.name for field in dataclasses.fields(digits.DigitBatch)]
    return digits.DigitBatch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in fields})


def against_held_out(pipe: Any, count: int = 2000, **arguments: Any) -> dict[str, float]:
    """Pictures with the captions of held-out real digits, against those digits.

    Returns:
        How often the judge reads digit, ink and paper as prompted, the Frechet distance, precision, recall, density and coverage
        in the judge's features.
    """
    judge, truth = load_judge(), held_out(count)
    read, features = judged(judge, generate(pipe, truth.captions(), **arguments))
    _, real = judged(judge, truth.images)
    accuracy = {name: (read[name] == getattr(truth, name)).float().mean().item() for name in digits.LABELS}
    return accuracy | {"frechet": frechet_distance(features, real)} | manifold_metrics(features, real)


def text_to_image(pipe: Any, count: int = 1000, **arguments: Any) -> dict[str, float]:
    """How often the judge reads digit, ink and paper as prompted, with the captions of test digits; and the distances.

    Args:
        pipe: a `GuidedPipeline`.
        **arguments: of its call: `num_inference_steps`, `guidance_scale`, ...
    """
    judge = load_judge()
    truth = digits.draw("test", count, seed=0)
    images = generate(pipe, truth.captions(), **arguments)
    read, _ = judged(judge, images)
    accuracy = {name: (read[name] == getattr(truth, name)).float().mean().item() for name in digits.LABELS}
    return accuracy | reference_distances(judge, images, count)


def steered(pipe: Any, guide: Any, count: int = 1000, **arguments: Any) -> dict[str, float]:
    """How often the null prompt, steered to digit i mod 10, gives a picture that the judge reads as that digit.

    Args:
        guide: `targets (B,) -> Guidance`.
    """
    judge = load_judge()
    targets = torch.arange(count) % 10
    images = generate(pipe, [""] * count, guidance=lambda rows: guide(targets[rows]), **arguments)
    read, _ = judged(judge, images)
    return {"digit": (read["digit"] == targets).float().mean().item()} | reference_distances(judge, images, count)


def classifier(model: AttributeClassifier) -> dict[str, float]:
    """Accuracy on the 1,000 held-out real digits."""
    batch = digits.draw("test", 1000, seed=0)
    read, _ = judged(model, batch.images)
    return {name: (read[name] == getattr(batch, name)).float().mean().item() for name in digits.LABELS}


@torch.no_grad()
def noisy_classifier(count: int = 1000) -> dict[str, dict[str, float]]:
    """Accuracy of the embedded noisy classifier on latents of held-out real digits, by noise-to-signal ratio."""
    from genkit.guidance import load_noisy_classifier
    from genkit.levels import Level
    from genkit.pipelines import GuidedPipeline

    model, truth = load_noisy_classifier("digits-noisy-classifier"), held_out(count)
    denoiser = GuidedPipeline.from_pretrained("digits").denoiser
    latents = torch.cat([denoiser.encode(part) for part in truth.images.split(250)])
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    figures = {}
    for ratio in (0.1, 0.3, 1.0, 3.0):
        level = Level(1.0, ratio, 0.0)
        read = {key: value.argmax(1) for key, value in model.attributes(level.diffuse(latents, eps), level).items()}
        figures[f"sigma {ratio:g}"] = {key: (value == getattr(truth, key)).float().mean().item() for key, value in read.items()}
    return figures


def discriminator(count: int = 2000) -> dict[str, dict[str, float]]:
    """What the embedded discriminator does to pictures of `digits`, without classifier-free guidance."""
    from genkit.guidance import DiscriminatorGuidance, load_discriminator
    from genkit.pipelines import GuidedPipeline

    pipe = GuidedPipeline.from_pretrained("digits")
    guides = {"unguided": None, "guided": DiscriminatorGuidance(load_discriminator("digits-discriminator"))}
    return {
        f"{steps} steps, {name}": against_held_out(pipe, count, num_inference_steps=steps, guidance_scale=1.0, guidance=guide)
        for steps in (10, 30)
        for name, guide in guides.items()
    }


def measure(name: str, count: int = 1000) -> dict[str, dict[str, float]]:
    """The figures of an embedded model's card, by what was measured.

    Args:
        name: an embedded model.
        count: number of pictures; a card's figures are from 1,000, those of `digits-discriminator` from 2,000.

    Raises:
        ValueError: a model that has no measurement.
    """
    from genkit.classifiers import load_classifier
    from genkit.guidance import ClassifierGuidance
    from genkit.pipelines import GuidedPipeline

    if name in ("digits-classifier", "digits-judge"):
        model = AttributeClassifier.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
        return {"held-out real digits": classifier(model)}
    if name == "digits-noisy-classifier":
        return noisy_classifier(count)
    if name == "digits-discriminator":
        return discriminator(count)
    if name == "digits-turbo":
        pipe = GuidedPipeline.from_pretrained(name)
        return {f"{n} step{'s' * (n > 1)}, no CFG": against_held_out(pipe, count, num_inference_steps=n) for n in (1, 2, 4)}
    if name != "digits":
        measured = "digits, digits-classifier, digits-judge, digits-noisy-classifier, digits-discriminator, digits-turbo"
        raise ValueError(f"There is no measurement of {name!r}. Measured: {measured}.")
    pipe = GuidedPipeline.from_pretrained(name)
    guide = load_classifier("digits-classifier")
    return {
        "captions of test digits, 30 steps, CFG 2": text_to_image(pipe, count, num_inference_steps=30, guidance_scale=2.0),
        "null prompt, 50 steps": steered(pipe, lambda targets: None, count, num_inference_steps=50),
        "null prompt, 50 steps, classifier guidance to a digit": steered(
            pipe, lambda targets: ClassifierGuidance(guide, targets), count, num_inference_steps=50
        ),
    }
