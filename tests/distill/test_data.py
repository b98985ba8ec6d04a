"""The data of a distillation: images encoded once, batches of one shape, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data.pictures import picture_size, read_picture
from genkit.data.source import ImageSource, open_source
from genkit.denoisers import Denoiser
from genkit.distill import LatentDataset, batch_rows, open_data
from genkit.distill.encode import SHARD, encode, nearest_size
from genkit.distill.shards import SYNTH, Part, fill, shard_file
from genkit.ranks import Ranks
from tests import tiny

SIZES = [(16, 16), (12, 20), (20, 12)]  # height, width


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser.of(tiny.pipeline("stable_diffusion"))


@pytest.fixture
def photos(tmp_path):
    """Twelve captioned pictures: of five wide, four tall and three square."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(30, 50)] * 5 + [(52, 30)] * 4 + [(40, 42)] * 3):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


def made(folder, shapes: dict[tuple[int, ...], int]) -> LatentDataset:
    """A folder of so many latents of each shape; those of item i are all i."""
    starts = itertools.accumulate(shapes.values(), initial=0)
    parts = [Part(range(start, start + n), shape) for start, (shape, n) in zip(starts, shapes.items(), strict=False)]
    settings = {"space": {}, "storage": "float32", "sampler": "ddim"}

    def make(part: Part):
        rows = torch.tensor(list(part.rows))
        return {"latents": rows.float().view(-1, 1, 1, 1).expand(-1, *part.shape), "seed": rows}, {"paired": True}

    fill(folder, SYNTH, settings, parts, make, resume=False, ranks=Ranks(), progress=lambda items: None)
    return LatentDataset(folder)


# Encoding


def test_images_are_encoded_once_with_their_captions(photos, denoiser, tmp_path):
    done = []
    data = open_data(photos, denoiser, cache=tmp_path / "c", storage="float32", batch_size=5, progress=done.append)
    assert sum(done) == 12
    assert data.shapes == [(4, 8, 8)]
    assert data.prompts[7] == "picture 7"
    assert data.seeds is None
    assert not data.paired
    expected = denoiser.encode(open_source(photos).images([7], (16, 16)))
    assert torch.allclose(data.latents([7]), expected, atol=1e-5)
    cond = data.condition(denoiser, [7, 2])
    assert torch.equal(cond.tensors["prompt_embeds"], denoiser.condition(["picture 7", "picture 2"]).tensors["prompt_embeds"])
    before = shard_file(tmp_path / "c", 0).stat().st_mtime_ns
    again = open_data(photos, denoiser, cache=tmp_path / "c", storage="float32")
    assert shard_file(tmp_path / "c", 0).stat().st_mtime_ns == before
    assert torch.equal(again.latents([7]), data.latents([7]))


def test_encoding_goes_on_where_it_stopped(denoiser, tmp_path):
    count, seen = SHARD + 20, []

    def stop(images: int) -> None:
        seen.append(images)
        if sum(seen) > SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_data("digits", denoiser, cache=tmp_path, count=count, sizes=[(4, 4)], batch_size=20, progress=stop)
    seen.clear()
    data = open_data("digits", denoiser, cache=tmp_path, count=count, sizes=[(4, 4)], batch_size=20, progress=seen.append)
    assert seen == [SHARD, 20]
    assert len(data) == count
    assert data.prompts == open_source("digits", count).captions
    assert data.labels[5] in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_digits_in_as_many_colours_as_wanted(denoiser, tmp_path):
    data = open_data("digits", denoiser, cache=tmp_path, count=4200, sizes=[(4, 4)], batch_size=500)
    assert len(data) == 4200
    assert len(set(data.prompts)) > 400


def test_pictures_go_to_the_nearest_shape(photos, denoiser, tmp_path):
    data = open_data(photos, denoiser, cache=tmp_path / "c", sizes=SIZES)
    texts = {shape: sorted(data.prompts[row] for row in rows) for shape, rows in data.buckets.items()}
    assert texts[4, 6, 10] == sorted(f"picture {i}" for i in range(5))
    assert texts[4, 10, 6] == sorted(f"picture {i}" for i in range(5, 9))
    assert texts[4, 8, 8] == sorted(f"picture {i}" for i in range(9, 12))
    for shape, rows in data.buckets.items():
        assert data.latents(rows).shape == (len(rows), *shape)
    with pytest.raises(ValueError, match=r"latents of 2 shapes .* Take rows of one bucket"):
        data.latents([0, 11])


def test_nearest_size():
    assert nearest_size([(64, 64), (48, 80)], 100, 160) == (48, 80)
    assert nearest_size([(64, 64), (48, 80)], 100, 101) == (64, 64)
    assert nearest_size([(32, 32), (128, 128)], 100, 100) == (128, 128)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_picture_size_is_that_of_the_upright_picture(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    width, height = read_picture(tmp_path / "a.jpg")[0].size
    assert picture_size(tmp_path / "a.jpg") == (height, width)


def test_unreadable_pictures_are_counted_and_named_or_left_out(photos, denoiser, tmp_path):
    good = (photos / "05.png").read_bytes()
    (photos / "05.png").write_bytes(good[: len(good) // 2])
    (photos / "06.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read. The first: The image '.*0[56].png' cannot be read"):
        open_data(photos, denoiser, cache=tmp_path / "c", sizes=SIZES, batch_size=4)
    data = open_data(photos, denoiser, cache=tmp_path / "c", sizes=SIZES, skip_bad=True)
    assert len(data) == 10
    assert sorted(data.skipped) == ["05.png", "06.png"]
    assert sorted(data.prompts) == sorted(f"picture {i}" for i in range(12) if i not in (5, 6))
    # Repaired, they are encoded after all.
    (photos / "05.png").write_bytes(good)
    (photos / "06.png").write_bytes(good)
    data = open_data(photos, denoiser, cache=tmp_path / "c", sizes=SIZES)
    assert len(data) == 12
    assert data.skipped == []
    assert len(data.buckets[4, 10, 6]) == 4
    assert sorted(data.prompts) == sorted(f"picture {i}" for i in range(12))


def test_nothing_that_can_be_read(photos, denoiser, tmp_path):
    for file in photos.glob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"holds no items"):
        open_data(photos, denoiser, cache=tmp_path / "c", skip_bad=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "float16"}, r"storage 'float32', but here it is storage 'float16'"),
        ({"sizes": [(8, 8)]}, r"sizes \[\[16, 16\]\], but here it is sizes \[\[8, 8\]\]"),
        ({"count": 5}, r"count 12, .* but here it is count 5"),
    ],
)
def test_a_cache_of_other_settings_is_refused(arguments, message, photos, denoiser, tmp_path):
    open_data(photos, denoiser, cache=tmp_path / "c", storage="float32")
    with pytest.raises(ValueError, match=message):
        open_data(photos, denoiser, cache=tmp_path / "c", **{"storage": "float32", **arguments})


def test_a_cache_of_other_captions_or_another_model_is_refused(photos, denoiser, tmp_path):
    open_data(photos, denoiser, cache=tmp_path / "c")
    with pytest.raises(ValueError, match=r"it has model 'Stable.*', but here it is model 'Stable"):
        open_data(photos, Denoiser.of(tiny.pipeline("stable_diffusion", seed=1)), cache=tmp_path / "c")
    (photos / "00.txt").write_text("another")
    with pytest.raises(ValueError, match=r"it has texts"):
        open_data(photos, denoiser, cache=tmp_path / "c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nowhere"}, r"There is no data 'nowhere'"),
        ({"cache": None}, r"are encoded into a folder. Give cache=FOLDER"),
        ({"storage": "int8"}, r"Unknown storage 'int8'"),
        ({"batch_size": 0}, r"batch_size=0 must be at least 1"),
        ({"sizes": [(15, 16)]}, r"height=15 does not fit the model"),
    ],
)
def test_bad_input(arguments, message, photos, denoiser, tmp_path):
    arguments = {"name": photos, "cache": tmp_path / "c", **arguments}
    with pytest.raises(ValueError, match=message):
        open_data(arguments.pop("name"), denoiser, **arguments)
    assert not (tmp_path / "c").exists()


def test_pictures_of_unknown_size_go_to_one(denoiser, tmp_path):
    source = ImageSource("noise", lambda rows, size: torch.zeros(len(rows), 3, *size), list(range(4)))
    common = {"storage": "float16", "skip_bad": False, "batch_size": 2, "ranks": Ranks(), "progress": lambda images: None}
    with pytest.raises(ValueError, match=r"'noise' does not say how large its pictures are"):
        encode(source, denoiser, tmp_path, sizes=SIZES, **common)
    encode(source, denoiser, tmp_path, sizes=SIZES[:1], **common)
    assert len(LatentDataset(tmp_path)) == 4


def test_data_without_captions_is_refused_by_a_text_model(photos, denoiser, tmp_path):
    for file in photos.glob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match=r"Stable Diffusion is conditioned on prompts, but the data in '.*' has none"):
        open_data(photos, denoiser, cache=tmp_path / "c")


def test_labels_for_a_class_conditional_model(photos, tmp_path):
    for i, file in enumerate(sorted(photos.glob("*.png"))):
        folder = photos / f"class {i % 2 + 1}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    dit = Denoiser.of(tiny.pipeline("dit"))
    data = open_data(photos, dit, cache=tmp_path / "c")
    assert data.condition(dit, [0, 11]).tensors["class_labels"].tolist() == [1, 2]


# Latent spaces


@pytest.mark.parametrize(
    ("family", "difference"),
    [
        ("sd3", r"channels 4, scale 0.18215, shift 0.0, but here it is channels 16, scale 1.5305, shift 0.0609"),
        ("sdxl", r"scale 0.18215, but here it is scale 0.13025"),
        ("ddpm", r"it has channels 4, factor 2, "),
    ],
)
def test_data_of_another_latent_space_is_refused(family, difference, photos, denoiser, tmp_path):
    open_data(photos, denoiser, cache=tmp_path / "c")
    with pytest.raises(ValueError, match=rf"is of another latent space than the model: .*{difference}"):
        open_data(tmp_path / "c", Denoiser.of(tiny.pipeline(family)))


# Batches


def test_every_row_once_an_epoch(tmp_path):
    data = made(tmp_path, {(1, 2, 2): 12, (1, 2, 4): 8})
    for epoch in range(2):
        rows = [row for step in range(5) for row in batch_rows(data, 4, 7, 5 * epoch + step)]
        assert sorted(rows) == list(range(20))


def test_batches_have_one_shape_and_leave_out_what_fills_none(tmp_path):
    data = made(tmp_path, {(1, 2, 2): 11, (1, 2, 4): 6, (1, 4, 2): 3})
    counts = collections.Counter()
    for epoch in range(30):
        batches = [batch_rows(data, 4, 0, 3 * epoch + step) for step in range(3)]
        assert [data.latents(batch).shape[0] for batch in batches] == [4, 4, 4]  # refuses several shapes
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == 12
        counts.update(rows)
    # Nobody is left out for good, but for the shape that fills no batch.
    assert sorted(counts) == list(range(17))
    assert min(counts.values()) >= 10


def test_order_depends_on_seed_and_step_alone(tmp_path):
    data = made(tmp_path, {(1, 2, 2): 40})
    orders = {(seed, epoch): [batch_rows(data, 8, seed, 5 * epoch + i) for i in range(5)] for seed in (0, 1) for epoch in (0, 1)}
    assert len({json.dumps(order) for order in orders.values()}) == 4
    assert batch_rows(LatentDataset(tmp_path), 8, 1, 8) == orders[1, 1][3]


@pytest.mark.parametrize(
    ("shapes", "batch_size", "message"),
    [
        ({(1, 2, 2): 5}, 6, r"A batch of 6 cannot be filled: there are 5 items. Use a batch size from 1 to 5"),
        ({(1, 2, 2): 5, (1, 2, 4): 3}, 6, r"the largest of 2 shapes has 5 items"),
        ({(1, 2, 2): 5}, 0, r"A batch of 0 cannot be filled"),
    ],
)
def test_batches_that_cannot_be_filled(shapes, batch_size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        batch_rows(made(tmp_path, shapes), batch_size, 0, 0)


# Reading


@pytest.mark.parametrize("memory", [0, 2**20])
def test_rows_across_shards_in_any_order(memory, tmp_path):
    made(tmp_path, {(1, 2, 2): 3, (1, 2, 4): 4})
    data = LatentDataset(tmp_path, memory=memory)
    assert data.latents([2, 0, 2]).mean((1, 2, 3)).tolist() == [2, 0, 2]
    assert data.latents([6, 3]).mean((1, 2, 3)).tolist() == [6, 3]
    assert data.seeds == list(range(7))
    for row in (-1, 7):
        with pytest.raises(IndexError, match=rf"There is no row {row}: the data has 7"):
            data.latents([row])


def test_many_items_open_quickly_and_are_read_lazily(tmp_path):
    count, per_shard = 100_000, 1000
    parts = [Part(range(start, start + per_shard), (1, 1, 2)) for start in range(0, count, per_shard)]
    fill(
        tmp_path, SYNTH, {"space": {}, "storage": "float16"}, parts,
        lambda part: ({"latents": torch.zeros(len(part.rows), *part.shape)}, {"prompts": [str(row) for row in part.rows]}),
        resume=False, ranks=Ranks(), progress=lambda items: None,
    )  # fmt: skip
    data = LatentDataset(tmp_path, memory=0)
    assert len(data) == count
    rows = batch_rows(data, 64, 0, 1500)
    assert data.latents(rows).shape == (64, 1, 1, 2)
    assert data.prompts[rows[0]] == str(rows[0])
    assert not any(shard._tensors for shard in data._shards)


def test_a_folder_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no latents. Make them with `genkit synth"):
        LatentDataset(tmp_path)


def test_real_images_are_no_pairs(photos, denoiser, tmp_path):
    data = open_data(photos, denoiser, cache=tmp_path / "c")
    with pytest.raises(ValueError, match=r"are real images, so none is a function of its initial noise"):
        data.noise([0])


def test_the_subset_of_a_source_knows_its_sizes(photos):
    source = open_source(photos)
    assert source.subset([5, 0]).sizes(0) == (52, 30)
    assert dataclasses.replace(source, sizes=None).subset([5]).sizes is None
