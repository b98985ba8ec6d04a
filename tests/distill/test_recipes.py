"""The recipes of `recipes/`: every one is valid, and runs a round on the tiny random pipeline of its family."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from genkit.distill import SynthConfig, synthesize
from genkit.distill.config import DistillConfig, recipe_teacher
from genkit.distill.sources import PixelEncoder
from genkit.distill.trainer import DistillTrainer
from genkit.files import read_toml
from genkit.pipelines import GuidedPipeline
from tests import tiny
from tests.distill.tiny_runs import data_of

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
FAMILIES = {"sd15": "stable_diffusion", "sdxl": "sdxl", "sd3-medium": "sd3", "flux-dev": "flux"}
SIZE = 16  # pixels

pytestmark = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


def family_of(recipe: Path) -> str:
    return FAMILIES[recipe.stem.rpartition("-")[0]]


def config_of(recipe: Path, **changes: object) -> DistillConfig:
    return DistillConfig.preset(recipe.stem.rpartition("-")[2], synthetic=True, side=64, recipe=recipe, **changes)


def test_it_says_what_it_is(recipe: Path) -> None:
    tables = read_toml(recipe)
    assert set(tables) <= {"about", "synth", "distill"}
    assert set(tables["about"]) >= {"what", "data", "machine", "memory", "time", "status"}
    assert tables["about"]["status"] == "not yet run on a GPU"
    assert recipe_teacher(recipe) == tables["distill"]["teacher"]
    assert recipe.name in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_its_settings_are_valid(recipe: Path) -> None:
    tables = read_toml(recipe)
    config = config_of(recipe)
    for name, value in tables["distill"].items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value), name
    for name, value in tables.get("synth", {}).items():
        assert getattr(SynthConfig.preset(recipe), name) == value, name


def test_it_runs(recipe: Path, tmp_path: Path) -> None:
    """Samples by its settings, where it has any, and a round of its own on them; only sizes and counts are other ones."""
    pipe = GuidedPipeline.from_pipe(tiny.pipeline(family_of(recipe)))
    if "synth" not in read_toml(recipe):
        data = data_of(pipe.denoiser, tmp_path / "data", count=4)
    else:
        settings = SynthConfig.preset(recipe, steps=1, height=SIZE, width=SIZE)
        data = synthesize(pipe, tmp_path / "data", settings, prompts=["a red seven", "a blue cat"], count=4)
    source = None
    config = config_of(recipe, batch_size=4, steps=1, head_width=8, checkpoint_every=0, preview_every=0)
    if config.method == "add":
        torch.manual_seed(0)
        vit = timm.create_model(config.encoder, pretrained=False, embed_dim=16, num_heads=2, img_size=28, num_classes=0)
        source = PixelEncoder.timm(vit, pipe.denoiser.codec)
    trainer = DistillTrainer(pipe.denoiser, data, config, tmp_path / "run", source=source)
    before = [p.detach().clone() for p in trainer.student.trained()]
    trainer.fit()
    assert trainer.step == 1
    assert any(not torch.equal(p, old) for p, old in zip(trainer.student.trained(), before, strict=True))
