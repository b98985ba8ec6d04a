"""The prior of layouts: its samples, its bound in nats, its training, its command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from genkit.cli.app import app
from genkit.data import scenes
from genkit.data.coco import write_coco
from genkit.layouts import Layout, LayoutPrior, pack
from genkit.layouts.prior import BOX_SCALE, RESOLUTION, prior_scheduler, prior_span, to_layouts, to_samples
from genkit.levels import training_level
from genkit.pipelines import LayoutPriorPipeline
from genkit.training import TrainConfig
from genkit.zoo.training.layout_prior import LayoutPriorConfig, train_layout_prior

NAMES = ["cat", "dog"]


def random_layouts(count: int, seed: int = 0) -> list[Layout]:
    """Cats on the left or dogs on the right, one or two of them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kind, objects = (int(torch.randint(2, (), generator=generator)) for _ in range(2))
        low = torch.rand(objects + 1, 2, generator=generator) * torch.tensor([0.2, 0.5]) + torch.tensor([0.5 * kind, 0.0])
        found.append(Layout([NAMES[kind]] * (objects + 1), torch.cat([low, low + 0.3], 1).tolist()))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LayoutPriorPipeline:
    folder = tmp_path_factory.mktemp("prior")
    config = LayoutPriorConfig(
        slots=2, width=32, layers=2,
        train=TrainConfig(steps=400, batch_size=128, lr=4e-3, warmup=20, ema_decay=0.98, validate_every=100, bf16=False),
    )  # fmt: skip
    figures = train_layout_prior(random_layouts(2000), NAMES, folder, config)
    assert figures["layouts"] == 2000
    return LayoutPriorPipeline.from_pretrained(folder)


def test_samples_and_layouts_are_the_same_thing() -> None:
    packed = pack(random_layouts(8), NAMES, 3)
    y = to_samples(packed, 2)
    assert y.shape == (8, 3, 7)
    assert y[0, 2].tolist() == [-1, -1, 1, 0, 0, 0, 0]  # an empty slot
    torch.testing.assert_close(to_layouts(y), packed)
    inverted = y.clone()
    inverted[..., -4:] = -y[..., -4:]
    assert (to_layouts(inverted)[..., 0] == -1).all()  # a box that is none makes no object


def test_the_bound_ends_at_the_resolution() -> None:
    scheduler = prior_scheduler()
    level = training_level(scheduler, torch.tensor([prior_span(scheduler)]))
    assert float(level.sigma / level.alpha) == pytest.approx(BOX_SCALE * RESOLUTION, rel=0.05)


def test_the_network_does_not_know_the_order_of_slots() -> None:
    torch.manual_seed(0)
    prior = LayoutPrior(NAMES, slots=3, width=16, layers=2).eval()
    y, t = torch.randn(2, 3, 7), torch.tensor([10, 500])
    torch.testing.assert_close(prior(y.flip(1), t), prior(y, t).flip(1))


def test_it_knows_what_is_likely(trained: LayoutPriorPipeline) -> None:
    left, right = (0.05, 0.1, 0.35, 0.4), (0.6, 0.1, 0.9, 0.4)
    likely, wrong_place, wrong_size = trained.nats(
        [Layout(["cat"], [left]), Layout(["cat"], [right]), Layout(["cat"], [(0.05, 0.1, 0.9, 0.9)])]
    ).tolist()
    assert likely < wrong_place - 2
    assert likely < wrong_size - 2
    # Of two classes that are as frequent, neither is preferred: log-odds 0.
    assert abs(likely - float(trained.nats(Layout(["dog"], [right])))) < 2
    assert trained.nats(Layout([], [])).dtype == torch.float64


def test_draws_depend_on_seed_and_row_alone(trained: LayoutPriorPipeline) -> None:
    trained.set_progress_bar_config(disable=True)
    drawn = trained(6, seed=3, num_inference_steps=20)
    fewer = trained(2, seed=3, num_inference_steps=20)
    torch.testing.assert_close(pack(fewer, NAMES, 2), pack(drawn[:2], NAMES, 2))
    sides = [
        (label, (box[0] + box[2]) / 2 < 0.5) for layout in drawn for label, box in zip(layout.labels, layout.boxes, strict=True)
    ]
    assert len(sides) >= 6
    assert sum((label == "cat") == left for label, left in sides) >= 0.9 * len(sides)


def test_bad_input(trained: LayoutPriorPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown class 'cow'"):
        trained.nats(Layout(["cow"], [(0, 0, 1, 1)]))
    with pytest.raises(ValueError, match="at most 2"):
        trained.nats(Layout(["cat"] * 3, [(0, 0, 1, 1)] * 3))
    with pytest.raises(ValueError, match="count=0"):
        trained(0)
    with pytest.raises(ValueError, match="at least 20"):
        train_layout_prior(random_layouts(5), NAMES, tmp_path)


def test_the_command_reads_coco(tmp_path: Path) -> None:
    annotated = scenes.coco_images(scenes.draw("train", 40))
    file = tmp_path / "coco.json"
    write_coco(file, annotated, scenes.CLASSES)
    line = ["train", "layout-prior", "--data", file, "--steps", 3, "--batch", 8, "--out", tmp_path / "prior", "--json"]
    run = lambda *more: CliRunner().invoke(app, [str(part) for part in (*line, *more)], prog_name="genkit")  # noqa: E731
    result = run("--classes", "seven,two", "--slots", 4)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["classes"] == ["seven", "two"]
    assert document["layouts"] == 40
    assert math.isfinite(document["nats"])
    prior = LayoutPriorPipeline.from_pretrained(tmp_path / "prior")
    assert prior.transformer.config.class_names == ["seven", "two"]
    assert json.loads(run("--dry-run").stdout)["slots"] == 6
    for more, message in (
        (("--classes", "sevn"), "Did you mean 'seven'"),
        (("--data", tmp_path / "no.json"), "There is no file"),
        (("--data", tmp_path / "prior" / "model_index.json"), "no COCO annotation file"),
    ):
        refused = run(*more)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_layouts_of_scenes_are_those_of_the_pictures() -> None:
    batch = scenes.draw("val", 6, seed=5)
    for layout, labels, boxes in zip(scenes.layouts("val", 6, seed=5), batch.labels, batch.boxes, strict=True):
        assert layout.labels == [scenes.CLASSES[label] for label in labels]
        torch.testing.assert_close(torch.tensor(layout.boxes), boxes)
    assert dataclasses.is_dataclass(batch)
