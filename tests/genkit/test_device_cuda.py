"""What runs on a CPU runs on a CUDA device, and says the same: pictures, labels, boxes, features. Skipped where there is none.

In float32 and without TF32, so that what differs is the order of additions alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from genkit import zoo
from genkit.classifiers import load_classifier
from genkit.cli.app import app
from genkit.data import digits
from genkit.features import FeatureExtractor
from genkit.guidance import AttendAndExcite, ClassifierGuidance, DiscriminatorGuidance
from genkit.guidance.discriminator import load_discriminator
from genkit.inversion.layout_search import LayoutSearch
from genkit.pipelines import DiffusionClassifierPipeline, GuidedPipeline, LayoutInversionPipeline, LayoutPriorPipeline
from tests import tiny
from tests.distill.tiny_runs import data_of
from tests.genkit.test_attention_cuda import exact_float32 as exact_float32

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = ["a red seven on a yellow background", "a blue two on a white background"]


def both(make: Callable[[str], Any]) -> tuple[Any, Any]:
    """What a function of the device returns on the CPU and on the GPU."""
    return make("cpu"), make(DEVICE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Root mean square of the difference, relative to that of the values."""
    error = (found.float().cpu() - expected.float()).norm() / expected.float().norm()
    assert error < tolerance, f"relative difference {error:.1e}"


def genkit(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="genkit")
    assert result.exit_code == code, result.output
    return result


class TestSampling:
    @pytest.mark.parametrize("kind", ["none", "classifier", "discriminator", "attend"])
    def test_digits(self, kind: str) -> None:
        def draw(device: str) -> Tensor:
            pipe = GuidedPipeline.from_pretrained("digits").to(device)
            guidance = {
                "none": lambda: None,
                "classifier": lambda: ClassifierGuidance(load_classifier("digits-classifier").to(device), "seven", scale=1.0),
                "discriminator": lambda: DiscriminatorGuidance(load_discriminator("digits-discriminator").to(device)),
                "attend": lambda: AttendAndExcite(["red"]),
            }[kind]()
            prompts = ["a red seven"] if kind == "attend" else PROMPTS
            out = pipe(prompts, seeds=range(len(prompts)), num_inference_steps=8, guidance=guidance, output_type="pt")
            return out.images

        expected, found = both(draw)
        assert_close(found, expected, 1e-3)

    @pytest.mark.parametrize("steps", [1, 4])
    def test_turbo(self, steps: int) -> None:
        def draw(device: str) -> Tensor:
            pipe = GuidedPipeline.from_pretrained("digits-turbo").to(device)
            return pipe(PROMPTS, seeds=[0, 1], num_inference_steps=steps, guidance_scale=1, output_type="pt").images

        expected, found = both(draw)
        assert_close(found, expected, 1e-3)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_command_with_heat_maps_and_entropies(self, dtype: str, tmp_path: Path) -> None:
        line = ["sample", "a red seven", "--seeds", "0-3", "--steps", 4, "--out", tmp_path, "--json", "--dtype", dtype]
        line += ["--heatmap-words", "red,seven", "--attention-entropy", "--attn", "strict", "--guidance", "classifier:label=seven"]
        document = json.loads(genkit(*line, "--device", DEVICE).stdout)
        assert len(document["images"]) == 4
        assert document["failed"] == []


def digit_images(count: int) -> Tensor:
    return digits.draw("test", count, seed=0).images


class TestReading:
    @pytest.mark.parametrize("fold", [True, False])
    def test_a_race_between_labels(self, fold: bool) -> None:
        def classify(device: str) -> Any:
            pipe = DiffusionClassifierPipeline.from_pretrained("digits").to(device)
            pipe.set_progress_bar_config(disable=True)
            return pipe(digit_images(3), labels=digits.DIGITS, template="a {}", policy="race", budget=1500, fold=fold)

        expected, found = both(classify)
        assert found.labels == expected.labels
        assert found.evaluations == pytest.approx(expected.evaluations, rel=0.2)  # where a label is out may be a close call
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            best = min(theirs, key=theirs.get)
            assert ours[best] == pytest.approx(theirs[best], rel=0.05)

    def test_losses_of_pairs(self) -> None:
        from genkit.scoring import PairPlan

        def losses(device: str) -> Tensor:
            denoiser = GuidedPipeline.from_pretrained("digits").to(device).denoiser
            with torch.no_grad():
                x0 = denoiser.encode(digit_images(2).to(device))
            plan = PairPlan(count=8).pairs(denoiser.pipe.scheduler, x0.shape[1:])
            return denoiser.losses(x0, plan, denoiser.condition(prompts=PROMPTS))

        expected, found = both(losses)
        assert_close(found, expected, 1e-4)

    def test_features(self) -> None:
        def features(device: str) -> Tensor:
            extractor = FeatureExtractor(GuidedPipeline.from_pretrained("digits").to(device).denoiser, ["mid"], t=100, pool=2)
            return extractor(digit_images(4).to(device))["mid"]

        expected, found = both(features)
        assert_close(found, expected, 1e-3)

    def test_objects(self) -> None:
        prior = LayoutPriorPipeline.from_pretrained(zoo.path("scenes-prior")).to(DEVICE)
        prior.set_progress_bar_config(disable=True)
        pipe = LayoutInversionPipeline.from_pretrained("scenes").to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        size = pipe.picture_size
        picture = np.full((size[1], size[0], 3), 200, dtype=np.uint8)
        picture[20:44, 20:44] = np.uint8(255) - (digit_images(1)[0, :, 4:28, 4:28].permute(1, 2, 0).numpy() * 60 + 100).astype(
            np.uint8
        )
        search = LayoutSearch(budget=200, anew=1, turns=1, steps=4)
        (found,) = pipe([picture], prior=prior, search=search).detections
        assert all(0 <= score <= 1 for score in found.scores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion whose heads are as wide as fused kernels want them, and latents of it."""
    path = tmp_path_factory.mktemp("cuda")
    pipe = tiny.pipeline("stable_diffusion", block_out_channels=(32, 64))
    pipe.save_pretrained(path / "model")
    data_of(GuidedPipeline.from_pipe(pipe).denoiser, path / "latents")
    return path


class TestTraining:
    def test_distillation(self, folder: Path, tmp_path: Path) -> None:
        line = ["distill", "ladd", "--teacher", folder / "model", "--data", folder / "latents", "--out", tmp_path / "run"]
        line += ["--batch-size", 4, "--head-width", 8, "--preview-every", 2, "--log-every", 1, "--lr", 1e-4, "--steps", 3]
        genkit(*line, "--device", DEVICE)
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 3

    def test_probe(self, tmp_path: Path) -> None:
        line = [
            "train",
            "probe",
            "--data",
            "digits",
            "--count",
            60,
            "--taps",
            "mid",
            "--out",
            tmp_path / "probe",
            "--device",
            DEVICE,
        ]
        genkit(*line)
        assert (tmp_path / "probe").is_dir()

    def test_token(self, tmp_path: Path) -> None:
        line = [
            "train",
            "token",
            "--classes",
            "seven",
            "--out",
            tmp_path,
            "--device",
            DEVICE,
            "--steps",
            2,
            "--updates",
            2,
            "--batch",
            2,
        ]
        genkit(*line)
        assert list(tmp_path.rglob("*.safetensors"))
