"""Settings of a distillation: defaults of the methods, recipes, records, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from genkit.distill.config import FREE, DistillConfig
from genkit.distill.shards import difference


def test_a_record_gives_the_same_settings() -> None:
    config = DistillConfig(
        levels=(1.0, 0.5), level_probs=(0.9, 0.1), taps=("mid", "block.1"), trackers=("tensorboard",), fused=False, lr=1e-6
    )
    assert DistillConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_learning_rate_and_round_follow_what_is_trained() -> None:
    assert DistillConfig().learning_rate == 1e-5
    assert DistillConfig(lora_rank=4).learning_rate == 5e-5
    assert DistillConfig(lora_rank=4, lr=2e-3).learning_rate == 2e-3
    assert DistillConfig().is_fused
    assert not DistillConfig(accumulation=2).is_fused
    assert not DistillConfig(fused=False).is_fused


def test_presets() -> None:
    """LADD needs no distillation loss on the teacher's own samples, and less noise on small latents; ADD is in pixels."""
    synthetic = DistillConfig.preset("ladd", synthetic=True, side=128)
    assert synthetic.distillation == 0
    assert synthetic.disc_noise == "logit-normal:1,1"
    real = DistillConfig.preset("ladd", synthetic=False, side=8)
    assert real.distillation == 0.5
    assert real.disc_noise == "logit-normal:0,1"
    add = DistillConfig.preset("add", synthetic=False, side=64)
    assert add.distillation == 2.5
    assert add.distillation_space == "pixel"
    assert add.encoder == "vit_small_patch14_dinov2"
    assert add.disc_condition == ("text", "image")


def test_a_recipe_is_over_the_preset_and_arguments_over_both(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[distill]\nmethod = "ladd"\nlevels = [1, 0.5]\nlr = 3e-5\ndistillation = 0.25\n')
    config = DistillConfig.preset("ladd", synthetic=True, side=8, recipe=recipe, lr=1e-4, disc_lr=None)
    assert config.levels == (1, 0.5)
    assert config.distillation == 0.25
    assert config.lr == 1e-4
    assert config.disc_lr == DistillConfig().disc_lr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[distill]\nmethod = "add"\n', "is for 'add', not 'ladd'"),
        ("[distill]\nlearning_rate = 1\n", "Unknown setting of a distillation 'learning_rate'"),
        ('[distill]\nsteps = "many"\n', "A setting has a value of another type"),
        ('[distill]\ntrackers = "wandb"\n', "trackers='wandb' must be a list of texts."),
        ("[distill]\nlevels = 0.5\n", "levels=0.5 must be a list of numbers."),
        ('[distill]\nlevels = ["1", "0.5"]\n', "levels=('1', '0.5') must be a list of numbers."),
        ("distill = {\n", "is no TOML"),
        ("\xff\xfe", "is no TOML"),
    ],
)
def test_recipes_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillConfig.preset("ladd", synthetic=True, side=8, recipe=recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lad"}, "Unknown method 'lad'. Did you mean 'ladd'?"),
        ({"gan": "hing"}, "Unknown gan 'hing'. Did you mean 'hinge'?"),
        ({"head": "linear"}, "Unknown head 'linear'"),
        ({"distillation_weight": "alhpa"}, "Unknown distillation_weight 'alhpa'"),
        ({"distillation_space": "pixels"}, "Unknown distillation_space 'pixels'"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' makes adversarial distillation diverge. Use bf16, or no."),
        ({"mixed_precision": "fp8"}, "Unknown mixed_precision 'fp8'"),
        ({"levels": (1.0, 0.5, 0.75)}, "Levels 1,0.5,0.75 are not descending"),
        ({"levels": (0.5, 0.25)}, "do not start at 1"),
        ({"levels": (1.5, 1.0)}, "each must be above 0 and at most 1"),
        ({"levels": ()}, "there must be at least one"),
        ({"levels": (1.0, 0.5), "level_probs": (1.0,)}, "there are 1 for 2 levels"),
        ({"disc_noise": "lognormal:1,1"}, "Unknown noise distribution 'lognormal'"),
        ({"disc_noise": "uniform:1,0"}, "is no interval between 0 and 1"),
        ({"steps": 0}, "steps=0 must be positive."),
        ({"batch_size": -1}, "batch_size=-1 must be positive."),
        ({"disc_lr": 0.0}, "disc_lr=0.0 must be positive."),
        ({"lr": 0.0}, "lr=0.0 must be positive."),
        ({"r1": -1.0}, "r1=-1.0 must not be negative."),
        ({"lora_rank": -4}, "lora_rank=-4 must not be negative."),
        ({"ema": 1.0}, "ema=1.0 must be at least 0 and below 1."),
        ({"adversarial": 0.0}, "adversarial=0.0 and all other losses are 0."),
        ({"batch_size": 10, "accumulation": 4}, "batch_size=10 is no multiple of accumulation=4."),
        ({"fused": True, "accumulation": 2}, "A fused round keeps the graph of its whole batch"),
        ({"method": "add"}, "ADD needs an image encoder"),
        ({"disc_condition": ("text", "image")}, "disc_condition 'image' is an embedding of ADD's image encoder"),
    ],
)
def test_values_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillConfig(**settings)


def test_every_setting_is_documented() -> None:
    described = DistillConfig.__doc__ or ""
    for field in dataclasses.fields(DistillConfig):
        assert re.search(rf"\b{field.name}\b", described), field.name


def test_what_a_continuation_may_change() -> None:
    before = DistillConfig(steps=100).to_json()
    assert difference(before, DistillConfig(steps=200, log_every=1, trackers=("wandb",)).to_json(), FREE) == ""
    changed = difference(before, DistillConfig(steps=200, lr=1e-3, gan="softplus").to_json(), FREE)
    assert changed == "it has gan 'hinge', lr None, but here it is gan 'softplus', lr 0.001"
