"""Real images for training: embedded digits and folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data.source import open_source


@pytest.fixture
def folder(tmp_path):
    for name, value in (("cats/a.png", 0), ("cats/b.jpg", 128), ("dogs/c.png", 255)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 40, 3), value, np.uint8)).save(tmp_path / name)
    return tmp_path


def test_digits_are_the_training_digits_with_captions():
    source = open_source("digits", 50)
    assert len(source) == 50
    images = source.images([3, 7], (32, 32))
    assert images.shape == (2, 3, 32, 32)
    assert source.captions[3].startswith("a")
    assert max(source.groups) < 4000
    assert source.images([0], (16, 16)).shape == (1, 3, 16, 16)


def test_folder_with_classes(folder):
    source = open_source(folder, 5)
    assert source.labels == ["cats", "cats", "dogs", "cats", "cats"]
    assert source.groups == [0, 1, 2, 0, 1]
    assert source.captions is None
    images = source.images([0, 2], (8, 8))
    assert images.shape == (2, 3, 8, 8)
    assert images[0].eq(-1).all()
    assert images[1].eq(1).all()


def test_pictures_that_are_held_are_the_same_bit_for_bit(folder):
    for source, size in ((open_source("digits", 300), (40, 40)), (open_source(folder, 5), (8, 16))):
        held = source.held(size)
        rows = [4, 0, 2, 4]
        assert torch.equal(held.images(rows, size), source.images(rows, size))
        assert torch.equal(held.images(rows, (16, 16)), source.images(rows, (16, 16)))
        assert torch.equal(held.subset(rows).images([1, 3], size), source.images([0, 4], size))
        assert held.names == source.names


def test_folder_with_captions(folder):
    lines = [{"file_name": name, "text": f"picture {name}"} for name in ("cats/a.png", "cats/b.jpg")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"1 of 3 images have no caption, for instance 'c.png'"):
        open_source(folder)
    (folder / "dogs" / "c.txt").write_text("a dog\n")
    assert open_source(folder).captions == ["picture cats/a.png", "picture cats/b.jpg", "a dog"]


def test_bad_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="There is no data 'nowhere'"):
        open_source("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path / "empty")
    (folder / "metadata.jsonl").write_text('{"file_name": "cats/a.png"}')
    with pytest.raises(ValueError, match="line 1 is not"):
        open_source(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "cats" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.png' cannot be read"):
        open_source(folder).images([0], (8, 8))
    assert torch.is_tensor(open_source(folder).images([2], (8, 8)))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays(tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 10, 3), np.uint8)
    stored = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHW": pixels[..., 0]}[layout]
    np.savez_compressed(tmp_path / "x.npz", arr_0=stored, captions=np.array(list("abcde")), labels=np.arange(5))
    source = open_source(tmp_path / "x.npz", 7)
    assert (len(source), source.captions[5:], source.labels[4:]) == (7, ["a", "b"], [4, 0, 1])
    assert source.sizes(3) == (8, 10)
    shown = np.repeat(stored[..., None], 3, axis=-1) if layout == "NHW" else pixels
    expected = torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(source.images([4, 6], (8, 10)), expected[[4, 1]])
    assert source.contents(6) == source.contents(1) != source.contents(0)
    assert source.subset([6]).contents(0) == source.contents(1)
