"""DreamTeacher: exact losses, taps of the paper, encodings, backbones, and runs that go on where they stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from genkit.data.source import open_source
from genkit.distill import DreamTeacher, DreamTeacherConfig, LatentDataset, export_backbone
from genkit.distill.dreamteacher_config import PRESETS
from genkit.distill.dreamteacher_data import Pictures, both_ways, labelled_rows, labels_of
from genkit.distill.dreamteacher_interpreter import Interpreter
from genkit.distill.dreamteacher_losses import (
    attention_loss,
    attention_map,
    dice_loss,
    label_loss,
    mse_loss,
    soft_label_loss,
    whiten,
)
from genkit.distill.dreamteacher_regressors import REGRESSORS, Regressor
from genkit.distill.dreamteacher_student import Backbone, DreamStudent, create_backbone
from genkit.distill.dreamteacher_teacher import TeacherLevels, ddim_noise, decoder_taps
from genkit.distill.path import Path as NoisePath
from genkit.features import FeatureExtractor
from genkit.training import TrainConfig
from tests.distill.tiny_runs import data_of, denoiser_of
from tests.genkit.test_features import adm_256


def maps(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


LEVELS = ((3, 8, 4, 4), (3, 6, 8, 8))


# Losses (T9)


def test_attention_loss_does_not_see_the_scale_of_a_sample_and_is_zero_at_equality() -> None:
    student, teacher = maps(*LEVELS), maps(*LEVELS, seed=1)
    scales = torch.tensor([0.1, 3.0, 50.0]).reshape(3, 1, 1, 1)
    plain = attention_loss(student, teacher)
    assert plain > 0.1
    torch.testing.assert_close(attention_loss([v * scales for v in student], teacher), plain)
    torch.testing.assert_close(attention_loss(student, [v * scales for v in teacher]), plain)
    assert attention_loss(student, student) == 0
    torch.testing.assert_close(attention_loss([v * scales for v in student], student), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_losses_are_means_of_what_each_sample_has() -> None:
    """Unlike with the norm of a whole batch, a sample's part does not depend on the others."""
    student, teacher = maps(*LEVELS), maps(*LEVELS, seed=1)
    student[0][1] *= 100
    for loss in (attention_loss, mse_loss):
        alone = [loss([v[i : i + 1] for v in student], [v[i : i + 1] for v in teacher]) for i in range(3)]
        torch.testing.assert_close(loss(student, teacher), torch.stack(alone).mean())


def test_attention_loss_of_two_places() -> None:
    """Activations in one place each, of 2 x 1: unit vectors at a right angle, whose distance is sqrt 2."""
    student, teacher = torch.zeros(1, 4, 2, 1), torch.zeros(1, 4, 2, 1)
    student[0, :, 0], teacher[0, 2, 1] = 3.0, -5.0
    torch.testing.assert_close(attention_loss([student], [teacher]), torch.tensor(math.sqrt(2)))
    torch.testing.assert_close(attention_map(student, 2.0), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("over", ["chw", "c"])
def test_mse_is_zero_for_a_student_that_equals_the_whitened_teacher(over: str) -> None:
    teacher = [5 * v + 2 for v in maps(*LEVELS)]
    student = [whiten(v, over) for v in teacher]
    assert mse_loss(student, teacher, over) == 0
    assert mse_loss(teacher, teacher, over) > 1, "the student's side is not whitened"
    scaled = [7 * v - 3 for v in teacher]
    torch.testing.assert_close(mse_loss(student, scaled, over), torch.tensor(0.0), atol=1e-8, rtol=0)
    axes = (1, 2, 3) if over == "chw" else (1,)
    torch.testing.assert_close(student[0].mean(axes), torch.zeros_like(student[0].mean(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(student[0].var(axes, correction=0), torch.ones_like(student[0].mean(axes)))


def test_whitening_over_channels_flattens_attention_and_over_all_values_does_not() -> None:
    (teacher,) = maps((1, 8, 2, 2))
    teacher[:, :, 0, 0] *= 10
    assert attention_map(whiten(teacher, "c")).std() < 1e-4
    assert attention_map(whiten(teacher, "chw"))[0, 0] > 0.9


def test_soft_labels_are_least_at_equality_and_teach_the_student_only() -> None:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    soft_label_loss(student, teacher).backward()
    assert teacher.grad is None
    probabilities = (teacher / 4).softmax(1)
    torch.testing.assert_close(student.grad, ((student / 4).softmax(1) - probabilities).detach() / 4 / 4)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    torch.testing.assert_close(soft_label_loss(teacher, teacher), entropy)


def test_dice_and_ignored_pixels() -> None:
    truth = torch.tensor([[[0, 1], [1, 255]]])
    right = nn.functional.one_hot(truth.where(truth < 255, 0), 3).movedim(-1, 1) * 40.0
    assert dice_loss(right, truth) < 1e-6
    wrong = right.roll(1, 1)
    torch.testing.assert_close(dice_loss(wrong, truth), torch.tensor(1.0))
    changed = right.clone()
    changed[:, :, 1, 1] = torch.tensor([0.0, 9.0, 30.0])
    assert label_loss(changed, truth) == label_loss(right, truth)
    torch.testing.assert_close(label_loss(wrong, truth) - label_loss(wrong, truth, dice=0), torch.tensor(3.0))


# Teacher


def test_taps_of_the_adm_decoder_are_the_papers_on_a_meta_device() -> None:
    """8, 16, 32 and 64 steps of 256 pixels: strides 32 to 4, before each up-sampling."""
    teacher = adm_256()
    sizes = [(64, 64), (32, 32), (16, 16), (8, 8)]  # C2 to C5 of a backbone at 256 pixels
    taps = decoder_taps(teacher, sizes)
    info = FeatureExtractor(teacher, taps).feature_info
    assert [entry.shape for entry in info] == [(1024, 8, 8), (1024, 16, 16), (512, 32, 32), (512, 64, 64)]
    assert [entry.reduction for entry in info] == [32, 16, 8, 4]
    blocks = ["block.22.pre", "block.25.pre", "block.28.pre", "block.31.pre"]
    assert [entry.module for entry in info] == [entry.module for entry in FeatureExtractor(teacher, blocks).feature_info]
    assert [entry.module for entry in info] == [f"up_blocks.{i}.attentions.2" for i in range(3)] + ["up_blocks.3.resnets.2"]
    levels = [(256, 64, 64), (512, 32, 32), (1024, 16, 16), (2048, 8, 8)]
    regressor = Regressor("ppm-fpn", levels, {entry.name: entry.shape for entry in info}, width=8)
    assert list(regressor.places.values()) == [3, 2, 1, 0]


@pytest.mark.parametrize("family", ["ddpm", "stable_diffusion", "dit", "sd3"])
def test_features_are_those_of_the_extractor_and_end_early(family: str) -> None:
    denoiser = denoiser_of(family)
    names = decoder_taps(denoiser, [(4, 4), (8, 8)])
    teacher = TeacherLevels(denoiser, names, [50])
    x0 = torch.randn(2, *denoiser.latent_shape(None, None))
    found = teacher(x0, torch.Generator().manual_seed(3))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    extractor = FeatureExtractor(denoiser, names, t=50, early_exit=False)
    extractor._noise = lambda x0, k, indices: eps  # type: ignore[method-assign]
    for name, value in extractor(latents=x0).items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=0)
        assert tuple(value.shape[1:]) == teacher.shapes[name]
    assert not any(value.requires_grad for value in found.values())
    assert next(iter(TeacherLevels(denoiser, names, [50], bf16=True)(x0).values())).dtype == torch.float32
    assert denoiser.dtype == torch.float32, "the model that was given stays as it is"


def test_several_times_are_drawn_for_each_sample() -> None:
    denoiser = denoiser_of("ddpm")
    teacher = TeacherLevels(denoiser, ["mid"], [0, 900])
    x0 = torch.randn(1, *denoiser.latent_shape(None, None)).expand(12, -1, -1, -1)
    found = teacher(x0, torch.Generator().manual_seed(0))["mid"].flatten(1)
    near = TeacherLevels(denoiser, ["mid"], [0])(x0[:1], torch.Generator().manual_seed(0))["mid"].flatten(1)
    distance = (found - near).square().mean(1)
    clean = distance < distance.max() / 4
    assert 0 < clean.sum() < 12


class Gaussian:
    """The exact denoiser of N(0, s^2): eps^ = sigma x / (alpha^2 s^2 + sigma^2)."""

    def __init__(self, s: float) -> None:
        self.s, self.pipe = s, diffusers.DDPMPipeline(None, diffusers.DDPMScheduler())  # type: ignore[arg-type]

    def __call__(self, x: Tensor, level: Any, cond: Any) -> Any:
        from genkit.prediction import Prediction

        alpha, sigma = float(level.alpha), float(level.sigma)
        return Prediction(x, level, sigma * x / (alpha**2 * self.s**2 + sigma**2), "eps")


def test_ddim_encoding_of_a_gaussian_follows_the_flow() -> None:
    """The sampling ODE keeps x in units of its standard deviation: x_t = sqrt(alpha^2 s^2 + sigma^2) x_0 / s."""
    denoiser: Any = Gaussian(0.5)
    path = NoisePath(denoiser.pipe.scheduler)
    x0 = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    level = path.level(0.4)
    eps = ddim_noise(denoiser, path, x0, 0.4, None, 400)  # type: ignore[arg-type]
    alpha, sigma = float(level.alpha), float(level.sigma)
    torch.testing.assert_close(alpha * x0 + sigma * eps, math.hypot(alpha * 0.5, sigma) / 0.5 * x0, rtol=0.01, atol=1e-3)


def test_ddim_features_are_deterministic() -> None:
    teacher = TeacherLevels(denoiser_of("stable_diffusion"), ["mid"], [200], encoding="ddim", ddim_steps=3)
    x0 = torch.randn(2, 4, 8, 8)
    first, second = (teacher(x0, torch.Generator().manual_seed(seed))["mid"] for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, TeacherLevels(teacher.denoiser, ["mid"], [200])(x0)["mid"])


# Backbones and regressors


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("resnet18", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("convnext_atto", [(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)]),
        ("vit_tiny_patch16_224", [(192, 4, 4)]),
    ],
)
def test_backbones_and_regressors(name: str, levels: list[tuple[int, ...]]) -> None:
    backbone = Backbone(create_backbone(name, (64, 64)), (64, 64))
    assert backbone.levels == levels
    targets = {"coarse": (7, 4, 4), "fine": (5, 8, 8)}
    student = DreamStudent(backbone, targets, width=8, num_classes=3, dense=True)
    found, logits = student(torch.randn(2, 3, 64, 64))
    assert {key: tuple(value.shape) for key, value in found.items()} == {"coarse": (2, 7, 4, 4), "fine": (2, 5, 8, 8)}
    assert logits is not None
    assert logits.shape == (2, 3, 64, 64)
    assert len(student.regressor.sizes) == 4
    with pytest.raises(ValueError, match=r"Pictures have shape \(2, 3, 32, 32\), but \(B, 3, 64, 64\) is needed"):
        student(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("kind", REGRESSORS)
def test_every_level_of_the_backbone_learns(kind: str) -> None:
    """Gradients of one tap reach the deepest level, through the pyramid's way down."""
    backbone = Backbone(create_backbone("resnet10t", (32, 32)), (32, 32))
    place = {"simple": (4, 4, 4), "fpn": (4, 8, 8), "ppm-fpn": (4, 8, 8)}[kind]
    student = DreamStudent(backbone, {"tap": place}, regressor=kind, width=8)
    student(torch.randn(4, 3, 32, 32))[0]["tap"].square().mean().backward()
    network: Any = backbone.network
    for block in (network.layer1, network.layer4):
        assert sum(float(p.grad.abs().sum()) for p in block.parameters()) > 0


@pytest.mark.parametrize("dense", [True, False])
def test_interpreter(dense: bool) -> None:
    interpreter = Interpreter({"fine": (6, 8, 8), "coarse": (8, 4, 4)}, 3, (16, 16), width=8, dense=dense)
    assert interpreter.names == ["coarse", "fine"]
    features = {"fine": torch.randn(2, 6, 8, 8), "coarse": torch.randn(2, 8, 4, 4)}
    assert interpreter(features).shape == ((2, 3, 16, 16) if dense else (2, 3))


# Data


def test_mirror_images_and_label_maps() -> None:
    source = open_source("digits-test", 8)
    twice = both_ways(source)
    size = (32, 32)
    assert len(twice) == 16
    assert torch.equal(twice.images([3, 11], size)[1], source.images([3], size)[0].flip(-1))
    assert twice.masks is not None
    masks = twice.masks([3, 11], size)
    assert torch.equal(masks[1], masks[0].flip(-1))
    assert masks[0].unique().tolist() == [0, 1 + ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
                                                  "nine"].index(str(source.labels[3]))]  # fmt: skip
    picture, ink = source.images([3], size)[0], masks[0] > 0
    assert (picture[:, ink].mean(1) - picture[:, ~ink].mean(1)).abs().max() > 0.2
    assert twice.masks([0], (64, 64)).shape == (1, 64, 64)


def test_labelled_rows_are_of_different_pictures_and_even() -> None:
    source = open_source("digits", 6000)  # some strokes appear twice
    rows = labelled_rows(source, 40, 0, dense=False)
    assert len({source.groups[row] for row in rows}) == 40
    targets, names = labels_of(source, rows, (32, 32), dense=False)
    assert targets.bincount().tolist() == [4] * 10
    assert names == sorted(names)
    assert rows != labelled_rows(source, 40, 1, dense=False)
    maps, names = labels_of(source, rows, (16, 16), dense=True)
    assert maps.shape == (40, 16, 16)
    assert len(names) == 11


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight pictures of two classes, and label maps of five of them."""
    rng = np.random.default_rng(0)
    for i in range(8):
        for kind, shape in (("photos", (20, 24, 3)), ("masks", (20, 24))):
            folder = tmp_path / kind / ("dark", "bright")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            if kind == "photos" or i < 5:
                Image.fromarray(rng.integers(0, 255 if kind == "photos" else 3, shape, np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_label_maps_of_a_folder(photos: Path) -> None:
    source = open_source(photos / "photos", masks=photos / "masks")
    assert sum(source.masked) == 5
    rows = labelled_rows(source, 4, 0, dense=True)
    maps, names = labels_of(source, rows, (16, 16), dense=True)
    assert (maps.shape, names) == ((4, 16, 16), ["0", "1", "2"])
    whole = source.masks([rows[0]], (20, 24))[0]
    assert torch.equal(whole, torch.from_numpy(np.array(Image.open(photos / "masks" / source.names[rows[0]]))).long())
    with pytest.raises(ValueError, match="has 2 labelled pictures of 'bright', but 3 are wanted"):
        labelled_rows(source, 6, 0, dense=True)
    with pytest.raises(ValueError, match="has no label maps of 'photos'"):
        open_source(photos / "photos", masks=photos)
    Image.new("RGB", (24, 20)).save(photos / "masks" / source.names[rows[0]])
    with pytest.raises(ValueError, match=r"cannot be read \(its mode is RGB, but a label map has grey values"):
        source.masks([rows[0]], (20, 24))


def test_samples_of_the_teacher_are_decoded(tmp_path: Path) -> None:
    denoiser = denoiser_of("stable_diffusion")
    pictures = Pictures(data_of(denoiser, tmp_path / "synth", count=8), denoiser, (32, 32), tmp_path / "unused")
    rows = pictures.rows(4, 0, 0, ranks_of(0, 1))
    assert pictures.pictures(rows).shape == (4, 3, 32, 32)
    assert torch.equal(pictures.clean(rows), LatentDataset(tmp_path / "synth").latents(rows))
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ValueError, match="of another latent space than the teacher: it has"):
        Pictures(LatentDataset(tmp_path / "synth"), denoiser_of("sd3"), (32, 32), tmp_path)
    larger = data_of(denoiser, tmp_path / "larger", count=4, shapes=[(4, 16, 16)])
    with pytest.raises(ValueError, match=r"samples of shape \(4, 16, 16\), but the teacher's features are those of \(4, 8, 8\)"):
        Pictures(larger, denoiser, (32, 32), tmp_path)


def ranks_of(index: int, world: int) -> Any:
    from genkit.ranks import Ranks

    return Ranks(index, world)


def test_processes_share_a_batch(tmp_path: Path) -> None:
    denoiser = denoiser_of("ddpm")
    pictures = Pictures(open_source("digits-test", 16), denoiser, (8, 8), tmp_path)
    both = [pictures.rows(4, 0, 1, ranks_of(i, 2)) for i in range(2)]
    assert sorted(both[0] + both[1]) == sorted(pictures.rows(8, 0, 1, ranks_of(0, 1)))
    assert not set(both[0]) & set(both[1])


# Runs

QUICK = TrainConfig(steps=4, batch_size=4, lr=1e-3, warmup=1, ema_decay=0.5, bf16=False, betas=(0.9, 0.95))


def tiny(**changes: Any) -> DreamTeacherConfig:
    quick: dict[str, Any] = {"backbone": "resnet10t", "size": 32, "width": 8, "teacher_bf16": False, "train": QUICK, "flip": False}
    return DreamTeacherConfig(**{**quick, "interpreter": dataclasses.replace(QUICK, steps=3), **changes})


MIXED = {"label": 1.0, "task": "segmentation", "labelled": 10}


def weights(student: nn.Module) -> list[Tensor]:
    return list(student.state_dict().values())


@pytest.mark.parametrize("changes", [{}, MIXED, {"label": 1.0, "task": "classification", "labelled": 10, "mse": 0, "attention": 0}])
def test_a_run_that_is_interrupted_ends_where_a_whole_one_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    denoiser, source, config = denoiser_of("stable_diffusion"), open_source("digits", 200), tiny(**changes)
    whole = DreamTeacher(denoiser, source, config, tmp_path / "whole").fit()
    run = DreamTeacher(denoiser, source, config, tmp_path / "parts")
    plain, count = run.loss, 0

    def loss(*arguments: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    run.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    resumed = DreamTeacher(denoiser, source, config, tmp_path / "parts").fit(resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    with pytest.raises(ValueError, match="already holds a run"):
        DreamTeacher(denoiser, source, config, tmp_path / "parts").fit()
    other = dataclasses.replace(config, power=3.0, train=dataclasses.replace(QUICK, lr=2e-3))
    with pytest.raises(
        ValueError, match=r"made otherwise: it has power 2.0, train.lr 0.001, but here it is power 3.0, train.lr 0.002"
    ):
        DreamTeacher(denoiser, source, other, tmp_path / "parts").fit(resume=True)


def test_the_student_learns_and_its_backbone_loads_in_plain_timm(tmp_path: Path) -> None:
    denoiser, source = denoiser_of("stable_diffusion"), open_source("digits", 64)
    loop = dataclasses.replace(QUICK, steps=40, batch_size=16, lr=3e-3, trackers=("tensorboard",))
    config = tiny(train=loop, teacher="digits")
    run = DreamTeacher(denoiser, source, config, tmp_path / "run")
    losses = []
    plain = run.loss
    run.loss = lambda *arguments: losses.append(plain(*arguments)) or losses[-1]  # type: ignore[method-assign]
    student = run.fit()
    assert losses[-1] < 0.8 * losses[0]
    assert list((tmp_path / "run" / "training").rglob("events.out.tfevents*"))
    export_backbone(student, config, tmp_path / "backbone", figures={"accuracy": 0.5})
    network, x = student.backbone.network, torch.randn(2, 3, 32, 32)
    file = str(tmp_path / "backbone" / "model.safetensors")
    plain_network = timm.create_model("resnet10t", num_classes=0, checkpoint_path=file).eval()
    assert torch.equal(plain_network(x), network(x))
    overlay = {"file": file, "num_classes": 0}
    tuned = timm.create_model("resnet10t", pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(tuned.forward_features(x), network.forward_features(x))
    local = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    assert torch.equal(local(x), network(x))
    assert local.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert tuple(local.pretrained_cfg["input_size"]) == (3, 32, 32)
    card = (tmp_path / "backbone" / "README.md").read_text()
    assert "| accuracy | 0.5 |" in card
    assert "from the diffusion model `digits`" in card
    assert "CC BY-SA" in card


def test_a_vision_transformer_is_exported_with_its_size(tmp_path: Path) -> None:
    config = tiny(backbone="vit_tiny_patch16_224", size=64, train=dataclasses.replace(QUICK, steps=1))
    student = DreamTeacher(denoiser_of("stable_diffusion"), open_source("digits", 8), config, tmp_path / "run").fit()
    export_backbone(student, config, tmp_path / "vit")
    x = torch.randn(1, 3, 64, 64)
    local = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    assert torch.equal(local(x), student.backbone.network(x))


def test_presets_are_both_sides_of_what_the_paper_says_twice() -> None:
    assert PRESETS["appendix"].train.lr == 4e-3
    assert DreamTeacherConfig.preset("main-text").train.lr == 2e-4
    assert DreamTeacherConfig.preset("main-text", batch_size=2048).train.lr == pytest.approx(1.6e-3)
    assert DreamTeacherConfig.preset("main-text", batch_size=2048, lr=1e-3).train.lr == 1e-3
    assert (PRESETS["appendix"].t, PRESETS["ablation"].t, PRESETS["imagenet"].t) == ((50,), (250,), (150,))
    assert DreamTeacherConfig.preset("imagenet", t=(90,)).train.optimizer == "lamb"
    assert DreamTeacherConfig.preset("appendix", steps=400).train.warmup == 80
    assert all(preset.train.betas == (0.9, 0.95) and preset.train.weight_decay == 0.05 for preset in PRESETS.values())


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet19"}, "Unknown backbone 'resnet19'. Did you mean"),
        ({"taps": ("block.9",), "size": 16}, r"The tap 'block.9' gives 8 x 8 maps, but the backbone has 4 x 4"),
        (
            {"size": 512},
            r"None of the teacher's maps \(up.0.pre 4 x 4, up.1 8 x 8\) is as large as one of the backbone's \(128 x 128",
        ),
        ({"taps": ("time_embedding",)}, r"needs maps \(C, h, w\), but these taps give none: time_embedding \(32,\)"),
        ({"t": (1000,)}, "t=1000 is out of range"),
        ({"backbone": "vit_tiny_patch16_224", "size": 8}, "cannot be made for 8 x 8 pictures|does not take 8 x 8 pictures"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamTeacher(denoiser_of("stable_diffusion"), open_source("digits", 20), tiny(**changes), tmp_path)


def test_other_data_is_refused(tmp_path: Path, photos: Path) -> None:
    denoiser = denoiser_of("stable_diffusion")
    unlabelled = photos / "photos" / "dark"
    with pytest.raises(ValueError, match="'dark' has no labels"):
        DreamTeacher(denoiser, open_source(unlabelled), tiny(label=1.0, task="classification"), tmp_path)
    with pytest.raises(ValueError, match="'dark' has no label maps"):
        DreamTeacher(denoiser, open_source(unlabelled), tiny(**MIXED), tmp_path)
    with pytest.raises(ValueError, match="samples of the teacher have none"):
        DreamTeacher(denoiser, data_of(denoiser, tmp_path / "synth"), tiny(**MIXED), tmp_path)
    with pytest.raises(ValueError, match="A batch of 4 cannot be filled: there are 3 items"):
        DreamTeacher(denoiser, open_source("digits", 3), tiny(), tmp_path / "few").fit()
    grey = denoiser_of("ddpm", in_channels=1, out_channels=1)
    with pytest.raises(ValueError, match="The teacher takes pictures of 1 channels, but a backbone learns from RGB"):
        DreamTeacher(grey, open_source("digits", 8), tiny(), tmp_path / "grey").fit()
    with pytest.raises(ValueError, match="Sequential gives no intermediate features"):
        Backbone(nn.Sequential(nn.Conv2d(3, 4, 1)), (8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "dim"}, "Unknown encoding 'dim'. Did you mean 'ddim'"),
        ({"regressor": "pafpn"}, "Unknown regressor 'pafpn'"),
        ({"whitening": "batch"}, "Unknown whitening 'batch'"),
        ({"encoding": "ddim", "t": (1, 2)}, "The ddim encoding goes to one timestep"),
        ({"t": ()}, r"t=\(\) must name a timestep"),
        ({"label": 1.0}, "label=1.0 and task='none' do not go together"),
        ({"task": "segmentation"}, "label=0.0 and task='segmentation' do not go together"),
        ({"mse": 0, "attention": 0}, "mse=0 and all other losses are 0"),
        ({"temperature": 0}, "temperature=0 must be positive"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_settings_are_json() -> None:
    assert json.loads(json.dumps(tiny().to_json()))["train"]["betas"] == [0.9, 0.95]
    with pytest.raises(ValueError, match="Unknown preset 'paper'"):
        DreamTeacherConfig.preset("paper")
    with pytest.raises(ValueError, match="Unknown optimizer 'sgd'"):
        TrainConfig(steps=1, optimizer="sgd")
