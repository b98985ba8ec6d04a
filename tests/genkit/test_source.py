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
