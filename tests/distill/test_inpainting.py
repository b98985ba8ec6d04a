"""Students that paint into masks: the masks, what the student is told, rounds, previews, and the pipelines of exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from genkit.denoisers import Denoiser
from genkit.distill import FewStepSpec, export_pipeline, gate
from genkit.distill.card import HERE
from genkit.distill.masks import lower_half, masked, random_masks
from genkit.distill.networks import Student, Teacher
from genkit.distill.trained import TrainedRun, start_from
from genkit.noise import normal
from tests import tiny
from tests.distill.tiny_runs import denoiser_of, trainer_of

PAINTERS = ("stable_diffusion", "sdxl", "sd3")


def student_of(family: str) -> Any:
    """The network of an inpainting student, in which mask and rest have an effect."""
    denoiser = denoiser_of(family)
    student = Student(Teacher(denoiser), extra_channels=1 + denoiser.latent_shape(16, 16)[0])
    generator = torch.Generator().manual_seed(3)
    for parameter in student.trained():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return student.network


def spec_of(family: str, **fields: Any) -> FewStepSpec:
    return FewStepSpec(method="ladd", levels=(1.0, 0.75, 0.5, 0.25), teacher=f"tiny-{family}", task="inpaint", **fields)


# Masks


def test_masks_are_rectangles_of_all_kinds():
    masks = random_masks(range(2000), 0, 0, (128, 256))
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    rows, columns = masks.amax(3).squeeze(1), masks.amax(2).squeeze(1)
    assert torch.equal(masks.squeeze(1), rows[:, :, None] * columns[:, None, :])  # a product, and each factor one stretch
    for line in (rows, columns):
        assert ((line[:, 1:] - line[:, :-1]).clamp(min=0).sum(1) + line[:, 0] == 1).all()
        assert line.sum(1).min() >= line.shape[1] / 4
        full = line.all(1)
        assert full.float().mean() == pytest.approx(1 / 3, abs=0.04)
        border = (line[:, 0] + line[:, -1] > 0) & ~full
        assert border.sum() / (~full).sum() == pytest.approx(1 / 3, abs=0.06)


def test_masks_are_functions_of_item_round_and_seed():
    masks = random_masks(range(8), 5, 1, (8, 8))
    assert torch.equal(masks[3:5], random_masks([3, 4], 5, 1, (8, 8)))
    assert not torch.equal(masks, random_masks(range(8), 6, 1, (8, 8)))
    assert not torch.equal(masks, random_masks(range(8), 5, 2, (8, 8)))


# What the student is told


@pytest.mark.parametrize("family", ["stable_diffusion", "ddpm"])
def test_the_painted_part_does_not_show(family):
    """Mask and rest are the same whatever lies inside of the mask."""
    denoiser = denoiser_of(family)
    x0 = denoiser.encode(normal([0, 1], (3, 16, 16)).clamp(-1, 1))
    mask = lower_half(2, x0.shape[-2:])
    pictures = denoiser.decode(x0).clamp(-1, 1)
    cond = masked(denoiser.condition(prompts=["a", "b"]) if family != "ddpm" else denoiser.condition(), x0, mask, denoiser)
    concat = cond.tensors["concat"]
    assert concat.shape == (2, 1 + x0.shape[1], *x0.shape[2:])
    assert torch.equal(concat[:, :1], mask)
    pictures[:, :, 8:] = 0
    torch.testing.assert_close(concat[:, 1:], denoiser.encode(pictures))
    if cond.null_tensors:
        assert torch.equal(cond.null_tensors["concat"], concat)


# Rounds


def test_the_discriminator_sees_the_real_sample_outside_of_the_mask(tmp_path):
    trainer = trainer_of(tmp_path, "stable_diffusion", task="inpaint", reconstruction=1.0, teacher="tiny")
    draw = trainer.draws(0)
    fakes = trainer.rounds.fakes(draw)
    assert draw.mask is not None
    kept = (draw.mask == 0).expand_as(draw.x0)
    assert kept.any()
    assert torch.equal(fakes.x0[kept], draw.x0[kept])
    assert not torch.equal(fakes.x0[~kept], draw.x0[~kept])
    # The teacher, and so its taps, sees the sample alone.
    assert "concat" not in draw.cond.tensors
    trainer.fit()
    assert trainer.step == 2
    assert TrainedRun(tmp_path / "run").spec().task == "inpaint"


def test_the_noise_is_fresh(tmp_path):
    """The noise that a sample came from would tell what is inside of the mask."""
    trainer = trainer_of(tmp_path, "stable_diffusion", task="inpaint", reconstruction=1.0, levels=(1.0,))
    draw = trainer.draws(0)
    known = trainer.draws.data.noise(range(16))
    assert not any(torch.equal(eps, other) for eps in draw.eps for other in known)


def test_previews_keep_what_is_not_masked(tmp_path):
    trainer = trainer_of(tmp_path, "stable_diffusion", task="inpaint", levels=(1.0, 0.5), preview_every=1, steps=1)
    x0 = trainer.draws.data.latents([0, 1])
    mask = lower_half(2, x0.shape[-2:])
    painted = trainer.monitor._painted(torch.zeros_like(x0), x0, mask)
    torch.testing.assert_close(painted, trainer.teacher.denoiser.decode(x0 * (1 - mask)))
    trainer.fit()
    assert (tmp_path / "run" / "previews" / "step-000001.png").is_file()


def test_starts_from_a_student_that_knows_no_mask(tmp_path):
    """Its weights, and zeros for the mask and the rest, so that it draws the same at first."""
    other = Denoiser.of(tiny.pipeline("stable_diffusion", 1)).network
    other.save_pretrained(tmp_path / "unet")
    student = Student(Teacher(denoiser_of("stable_diffusion")), extra_channels=5)
    start_from(str(tmp_path / "unet"), student.network)
    grown, own = student.network.state_dict(), other.state_dict()
    assert torch.equal(grown["conv_in.weight"][:, :4], own["conv_in.weight"])
    assert not grown["conv_in.weight"][:, 4:].any()
    assert all(torch.equal(grown[name], value) for name, value in own.items() if name != "conv_in.weight")
    with pytest.raises(ValueError, match="No student can start from"):
        start_from("digits-turbo", student.network)  # embedded, and of another size


# Exports


@pytest.mark.parametrize("family", PAINTERS)
def test_exports_are_stock_inpainting_pipelines(family, tmp_path):
    found = export_pipeline(tiny.pipeline(family), student_of(family), spec_of(family), tmp_path / "out")
    assert set(found) == {"stock, 1 step", "stock, 2 steps", "stock, 4 steps"}
    assert max(found.values()) < gate.TOLERANCE
    assert FewStepSpec.load(tmp_path / "out") == spec_of(family)


def test_a_mask_in_another_place_does_not_pass(tmp_path, monkeypatch):
    """The gate sees what the mask says."""
    monkeypatch.setattr(gate, "lower_half", lambda count, size, device: lower_half(count, size, device) * 0.49)
    with pytest.raises(ValueError, match=r"differs from the trainer's sampler by"):
        export_pipeline(tiny.pipeline("sd3"), student_of("sd3"), spec_of("sd3"), tmp_path / "out")


def test_the_calls_of_the_card_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export_pipeline(
        tiny.pipeline("stable_diffusion"), student_of("stable_diffusion"), spec_of("stable_diffusion"), tmp_path / "out"
    )
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 8, 16, 16))
    picture.save("picture.png")
    mask.save("mask.png")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "An inpainting student of tiny-stable_diffusion in 1 to 4 steps" in text
    assert "multiples of 2 pixels" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace(HERE, str(tmp_path / "out")), names)
    image = names["image"].convert("RGB")
    upper, lower = (0, 0, 16, 8), (0, 8, 16, 16)
    assert image.crop(upper).tobytes() == picture.crop(upper).tobytes()
    assert image.crop(lower).tobytes() != picture.crop(lower).tobytes()


def test_families_without_such_a_pipeline(tmp_path):
    pixart = tiny.pipeline("pixart_sigma")
    with pytest.raises(
        ValueError, match=r"no pipeline for an inpainting student of PixArtSigmaPipeline, only for those of StableDiff"
    ):
        export_pipeline(pixart, student_of("pixart_sigma"), spec_of("pixart_sigma"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"Unknown task of a student 'outpaint'"):
        FewStepSpec(method="ladd", levels=(1.0,), task="outpaint")
