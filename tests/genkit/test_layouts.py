"""Layouts: their checks, the two encoders, the layout-to-image pipeline on a tiny model, and the scenes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torchvision.ops import box_iou

from genkit.data import digits, scenes
from genkit.denoisers import Denoiser
from genkit.layouts import Layout, LayoutEncoder, pack
from genkit.layouts.encoder import painted
from genkit.levels import levels_of
from genkit.pipelines import GuidedPipeline, LayoutToImagePipeline
from genkit.zoo.training import scenes as training

NAMES = ["circle", "square", "star"]
LAYOUT = Layout(["star", 0], [(0.1, 0.2, 0.5, 0.6), (0.5, 0.5, 1.0, 0.9)])


def tiny(codec: str = "gligen", paint: int = 0) -> LayoutToImagePipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=6 + (paint + 4 if paint else 0), out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, attention_head_dim=4,
        norm_num_groups=8,
    )  # fmt: skip
    encoder = LayoutEncoder(NAMES, slots=3, dim=16, codec=codec, vocabulary=101, layers=1, paint=paint)
    return LayoutToImagePipeline(vae=vae.eval(), unet=unet.eval(), layout_encoder=encoder.eval(), scheduler=DDIMScheduler())


def test_packing_puts_objects_before_empty_slots() -> None:
    packed = pack([LAYOUT, Layout([], [])], NAMES, 3)
    assert packed.shape == (2, 3, 5)
    assert packed[0, :, 0].tolist() == [2, 0, -1]
    torch.testing.assert_close(packed[0, 0, 1:], torch.tensor([0.1, 0.2, 0.5, 0.6]))
    assert packed[1, :, 0].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("labels", "boxes", "message"),
    [
        (["star"], [], "1 labels and 0 boxes"),
        (["star"], [(0.1, 0.1, 0.4)], "3 numbers"),
        (["star"], [(-0.1, 0.1, 0.4, 0.4)], "outside the picture"),
        (["star"], [(0.1, 0.1, 0.4, 1.4)], "outside the picture"),
        (["star"], [(0.1, 0.1, float("nan"), 0.4)], "outside the picture"),
        (["star"], [(0.5, 0.1, 0.4, 0.4)], "inverted or empty"),
        (["star"], [(0.4, 0.1, 0.4, 0.4)], "inverted or empty"),
        (["star"], [("", 0.1, 0.1, 0.4, 0.4)], "not four numbers"),
        (["star"], [("0.1", 0.1, 0.4, 0.4)], "not four numbers"),
    ],
)
def test_wrong_boxes_are_refused(labels: list[str], boxes: list[tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(labels, boxes)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="4 objects, but the model takes at most 3"):
        pack([Layout([0] * 4, [(0, 0, 1, 1)] * 4)], NAMES, 3)
    with pytest.raises(ValueError, match="stat"):
        pack([Layout(["stat"], [(0, 0, 1, 1)])], NAMES, 3)
    with pytest.raises(ValueError, match="There is no class 3"):
        pack([Layout([3], [(0, 0, 1, 1)])], NAMES, 3)
    with pytest.raises(ValueError, match="no layouts"):
        pack([], NAMES, 3)
    with pytest.raises(ValueError, match="gligan"):
        LayoutEncoder(NAMES, codec="gligan")
    with pytest.raises(ValueError, match="vocabulary=3 is too small"):
        LayoutEncoder(NAMES, codec="tokens", vocabulary=3)
    with pytest.raises(ValueError, match="paint=4 needs the codec 'gligen'"):
        LayoutEncoder(NAMES, codec="tokens", paint=4)


def test_gligen_tokens_are_those_of_the_objects_in_any_order() -> None:
    encoder = tiny().layout_encoder
    packed = pack([LAYOUT], NAMES, 3)
    tokens = encoder(packed)["layout_embeds"]
    assert tokens.shape == (1, 3, 16)
    torch.testing.assert_close(encoder(packed.flip(1))["layout_embeds"], tokens.flip(1))
    # An empty slot's box and class do not matter.
    other = packed.clone()
    other[0, 2, 1:] = 0.7
    torch.testing.assert_close(encoder(other)["layout_embeds"], tokens)
    torch.testing.assert_close(encoder.null(2)["layout_embeds"][1, 0], tokens[0, 2])


def test_a_painted_layout_shows_where_objects_are_in_any_order() -> None:
    encoder = tiny(paint=5).layout_encoder
    packed = pack([LAYOUT], NAMES, 3)
    told = encoder(packed)
    assert told["layout_objects"].shape == (1, 3, 10)
    canvas = painted(told["layout_objects"], told["layout_known"], 40, 80)
    assert canvas.shape == (1, 9, 40, 80)
    # The first object alone at (0.2, 0.3): its features, one object, the place in its box from -1 to 1; and that all is told.
    place = canvas[0, :, 12, 16]
    torch.testing.assert_close(place[:5], told["layout_objects"][0, 0, :5], atol=2e-2, rtol=0)
    at = torch.tensor([1.0, 2 * (16.5 / 80 - 0.1) / 0.4 - 1, 2 * (12.5 / 40 - 0.2) / 0.4 - 1, 1.0])
    torch.testing.assert_close(place[5:], at, atol=2e-2, rtol=0)
    assert canvas[0, :-1, 2, 40].abs().max() < 1e-2  # nothing is there
    torch.testing.assert_close(painted(encoder(packed.flip(1))["layout_objects"], told["layout_known"], 40, 80), canvas)
    assert (painted(*list(encoder.null(1).values())[1:], 4, 4) == 0).all()
    part = encoder(packed, torch.tensor([[0.5, 0.0, 1.0, 0.5]]))
    assert painted(part["layout_objects"], part["layout_known"], 2, 2)[0, -1].tolist() == [[0, 1], [0, 0]]


def test_a_network_that_is_told_by_paint_follows_it() -> None:
    denoiser = Denoiser.of(tiny(paint=5))
    cond = denoiser.condition(layouts=[LAYOUT, Layout([], [])])
    denoiser.pipe.scheduler.set_timesteps(2)
    x, level = torch.randn(2, 4, 8, 8), levels_of(denoiser.pipe.scheduler)[0]
    told = denoiser(x, level, cond).x0
    moved = denoiser.condition(layouts=[Layout(LAYOUT.labels, [(0.5, 0.2, 0.9, 0.6), LAYOUT.boxes[1]]), Layout([], [])])
    moved.tensors["layout_embeds"] = cond.tensors["layout_embeds"]
    assert not torch.equal(denoiser(x, level, moved).x0[0], told[0])
    with pytest.raises(ValueError, match="Give layouts"):
        denoiser.condition(layout_embeds=cond.tensors["layout_embeds"])


def test_a_box_has_a_gradient_in_the_gligen_codec() -> None:
    packed = pack([LAYOUT], NAMES, 3).requires_grad_()
    told = tiny(paint=5).layout_encoder(packed)
    (told["layout_embeds"].square().sum() + painted(told["layout_objects"], told["layout_known"], 8, 8).square().sum()).backward()
    assert packed.grad is not None
    assert (packed.grad[0, :2, 1:] != 0).all()
    assert (packed.grad[0, 2] == 0).all()


def test_the_vocabulary_shares_one_table() -> None:
    encoder = tiny("tokens").layout_encoder
    ids = encoder.embedder.ids(pack([LAYOUT], NAMES, 3))
    # 101 rows: a grid of 10 x 10 points, and the last row for what is empty.
    assert ids.tolist() == [[2, 21, 54, 0, 44, 89, 100, 100, 100]]
    corner = pack([Layout([1], [(0.0, 0.0, 1.0, 1.0)])], NAMES, 3)
    assert encoder.embedder.ids(corner)[0, :3].tolist() == [1, 0, 99]
    assert encoder(corner)["layout_embeds"].shape == (1, 9, 16)


@pytest.mark.parametrize(("codec", "paint"), [("gligen", 0), ("gligen", 5), ("tokens", 0)])
def test_the_pipeline_round_trips_and_depends_on_the_layout(codec: str, paint: int, tmp_path: Path) -> None:
    pipe = tiny(codec, paint)
    pipe.save_pretrained(tmp_path)
    loaded = GuidedPipeline.from_pretrained(tmp_path)
    images = {name: p(layouts=LAYOUT, seeds=[3], num_inference_steps=2, output_type="pt").images
              for name, p in (("own", GuidedPipeline(pipe)), ("loaded", loaded))}  # fmt: skip
    torch.testing.assert_close(images["own"], images["loaded"])
    assert images["own"].shape == (1, 3, 16, 16)
    moved = Layout(LAYOUT.labels, [(0.5, 0.2, 0.9, 0.6), LAYOUT.boxes[1]])
    assert not torch.equal(pipe(moved, seeds=[3], num_inference_steps=2, output_type="pt").images, images["own"])


def test_nothing_known_is_not_nothing_there() -> None:
    denoiser = Denoiser.of(tiny(paint=5))
    cond, empty = denoiser.condition(layouts=LAYOUT), denoiser.condition(layouts=Layout([], []))
    denoiser.pipe.scheduler.set_timesteps(2)
    x, level = torch.randn(1, 4, 8, 8), levels_of(denoiser.pipe.scheduler)[0]
    assert not torch.equal(denoiser(x, level, cond.null()).x0, denoiser(x, level, empty).x0)
    torch.testing.assert_close(denoiser(x, level, cond.null()).x0, denoiser(x, level, empty.null()).x0)


def test_the_null_condition_is_the_empty_layout() -> None:
    pipe = tiny()
    denoiser = Denoiser.of(pipe)
    cond, empty = denoiser.condition(layouts=LAYOUT), denoiser.condition(layouts=Layout([], []))
    torch.testing.assert_close(cond.null().tensors["layout_embeds"], empty.tensors["layout_embeds"])
    pipe.scheduler.set_timesteps(2)
    level = levels_of(pipe.scheduler)[0]
    x = torch.randn(1, 4, 8, 8)
    assert denoiser(x, level, cond).x0.shape == x.shape
    with pytest.raises(ValueError, match="conditioned on a layout"):
        denoiser.condition()
    with pytest.raises(ValueError, match="prompts"):
        denoiser.condition(layouts=LAYOUT, prompts="a star")


def test_scenes_show_what_their_boxes_say() -> None:
    batch = scenes.draw("val", 10)
    assert batch.images.shape == (10, 3, 64, 64)
    assert batch.images.abs().max() <= 1
    for image, labels, boxes in zip(batch.images, batch.labels, batch.boxes, strict=True):
        assert 1 <= len(labels) == len(boxes) <= scenes.MAX_OBJECTS
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        paper = image.flatten(1).median(1).values
        visible = ((image - paper[:, None, None]).abs().sum(0) > 0.5).nonzero()
        covered = torch.zeros(64, 64, dtype=torch.bool)
        for x0, y0, x1, y1 in (boxes * 64).round().int().tolist():
            covered[max(0, y0 - 1) : y1 + 1, max(0, x0 - 1) : x1 + 1] = True
        assert covered[visible[:, 0], visible[:, 1]].float().mean() > 0.99


def test_scenes_are_functions_of_their_index_and_keep_the_splits_apart() -> None:
    a, b = scenes.draw("test", 6, seed=5), scenes.draw("test", 3, seed=5)
    assert torch.equal(a.images[:3], b.images)
    assert not torch.equal(scenes.draw("test", 3, seed=6).images, b.images)
    shapes = {split: len(scenes._strokes(split)[0]) for split in scenes.SPLITS}
    assert shapes == {"train": 3600, "val": 400, "test": len(digits.strokes("test")[0])}
    crowded = scenes.draw("train", 8, kind="crowded")
    assert min(len(labels) for labels in crowded.labels) >= 3
    for boxes in scenes.draw("train", 8, kind="sparse").boxes:
        assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() < 1e-6
    with pytest.raises(ValueError, match="tests"):
        scenes.draw("tests", 1)
    with pytest.raises(ValueError, match="dense"):
        scenes.draw("test", 1, kind="dense")


def test_training_tells_all_of_what_it_says_is_known() -> None:
    layouts = training.packed(scenes.draw("train", 64)).repeat(8, 1, 1)
    thinned, known = training.thinned(layouts, torch.Generator().manual_seed(0)).split([training.SLOTS, 1], dim=1)
    known = known[:, 0, 1:]
    before, after = ((part[..., 0] >= 0).sum(1) for part in (layouts, thinned))
    nothing, everything = (known == 0).all(1), (known == torch.tensor([0.0, 0, 1, 1])).all(1)
    assert 0.05 < nothing.float().mean() < 0.15
    assert 0.4 < everything.float().mean() < 0.6
    assert (after[nothing] == 0).all()
    assert (after == before)[everything].all()
    assert (after < before)[~nothing & ~everything].any()
    for row, box, source in zip(thinned[:128], known, layouts, strict=False):
        told = {tuple(slot.tolist()) for slot in row if slot[0] >= 0}
        others = {tuple(slot.tolist()) for slot in source if slot[0] >= 0} - told
        # What is told was there; what is not told does not reach into the known box.
        assert told <= {tuple(slot.tolist()) for slot in source}
        for _, x0, y0, x1, y1 in others:
            assert x1 <= box[0] or x0 >= box[2] or y1 <= box[1] or y0 >= box[3] or (box == 0).all()
