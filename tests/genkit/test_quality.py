"""The embedded models do what their cards say, checked again on fewer pictures by the judge, which never guides."""

from __future__ import annotations

import pytest
import torch

from genkit import zoo
from genkit.data import digits
from genkit.metrics.frechet import frechet_distance
from genkit.pipelines import GuidedPipeline
from genkit.zoo import quality


@pytest.fixture(scope="module")
def pipe():
    return GuidedPipeline.from_pretrained("digits")


@pytest.mark.parametrize("name", ["digits-classifier", "digits-judge"])
def test_classifiers_read_held_out_digits(name):
    figures = quality.measure(name)["held-out real digits"]
    assert figures == pytest.approx(zoo.card(name)["quality"], abs=0.002)
    assert figures["digit"] >= 0.98
    assert min(figures["ink"], figures["paper"]) >= 0.99


def test_judge_and_guide_are_different_networks():
    guide, judge = (zoo.card(name)["training"] for name in ("digits-classifier", "digits-judge"))
    assert guide["seed"] != judge["seed"]
    assert guide["parameters"] != judge["parameters"]


def test_prompts_are_followed(pipe):
    figures = quality.text_to_image(pipe, 100, num_inference_steps=20, guidance_scale=2.0)
    assert min(figures["digit"], figures["ink"], figures["paper"]) >= 0.96
    assert figures["ratio"] <= 2.0


def test_partial_prompts_are_followed(pipe):
    """ "a seven" fixes the digit, "a red digit" the ink; numerals and words mean the same."""
    judge = quality.load_judge()
    prompts = [f"a {digits.DIGITS[i % 10]}" if i < 20 else digits.with_articles(f"a {i % 10}") for i in range(40)]
    read, _ = quality.judged(judge, quality.generate(pipe, prompts, num_inference_steps=20, guidance_scale=2.0))
    assert (read["digit"] == torch.arange(40) % 10).float().mean() >= 0.9
    prompts = [digits.with_articles(f"a {digits.COLORS[i % 8]} digit") for i in range(24)]
    read, _ = quality.judged(judge, quality.generate(pipe, prompts, num_inference_steps=20, guidance_scale=2.0))
    assert (read["ink"] == torch.arange(24) % 8).float().mean() >= 0.9


def test_classifier_guidance_steers_the_null_prompt(pipe):
    from genkit.classifiers import load_classifier
    from genkit.guidance import ClassifierGuidance

    guide = load_classifier("digits-classifier")
    plain = quality.steered(pipe, lambda targets: None, 50, num_inference_steps=25)
    guided = quality.steered(pipe, lambda targets: ClassifierGuidance(guide, targets), 50, num_inference_steps=25)
    assert plain["digit"] <= 0.3
    assert guided["digit"] >= 0.8


def test_loads_with_the_stock_pipeline(pipe):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(zoo.path("digits"), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for one in (pipe, stock):
        generator = [torch.Generator().manual_seed(i) for i in range(2)]  # the sampler adds noise
        arguments = {"latents": latents, "generator": generator, "num_inference_steps": 5, "guidance_scale": 2.0}
        results.append(one(["a red seven", "a blue one"], **arguments, output_type="pt").images)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_frechet_distance_in_closed_form():
    """Diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, here on samples whitened to have exactly these moments."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=g, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    s1, s2, shift = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([1.5, 1.0, 0.5, 3.0]), torch.tensor([1.0, 0.0, -2.0, 0.0])
    expected = shift.square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(x * s1, x * s2 + shift) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"\(500, 4\) and \(1, 4\)"):
        frechet_distance(x, x[:1])
