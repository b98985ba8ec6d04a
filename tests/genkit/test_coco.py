"""COCO's files, read and written, and the figures that pycocotools makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from genkit.data import scenes
from genkit.data.coco import CocoImage, annotation_document, pixels, read_coco, write_coco
from genkit.layouts import Layout
from genkit.metrics.detection import average_precision

NAMES = ["cat", "dog"]
IMAGES = [
    CocoImage(7, "a.png", 64, 32, Layout(["cat", "dog"], [(0.0, 0.0, 0.5, 0.5), (0.25, 0.5, 1.0, 1.0)])),
    CocoImage(9, "b.png", 64, 64, Layout([], [])),
]


def results(images: list[CocoImage], shift: float = 0.0) -> list[dict[str, Any]]:
    found = []
    for image in images:
        for label, box in zip(image.layout.labels, image.layout.boxes, strict=True):
            bbox = pixels([side + shift for side in box], image.width, image.height)
            found.append({"image_id": image.id, "category_id": NAMES.index(str(label)) + 1, "bbox": bbox, "score": 0.9})
    return found


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco.json", IMAGES, NAMES)
    data = read_coco(tmp_path / "coco.json")
    assert data.class_names == NAMES
    assert [(image.id, image.file_name, image.width, image.height) for image in data.images] == [
        (7, "a.png", 64, 32),
        (9, "b.png", 64, 64),
    ]
    assert data.images[0].layout.labels == ["cat", "dog"]
    torch.testing.assert_close(torch.tensor(data.images[0].layout.boxes), torch.tensor(IMAGES[0].layout.boxes))
    assert data.images[1].layout.labels == []
    assert annotation_document(IMAGES, NAMES)["annotations"][1]["bbox"] == [16.0, 16.0, 48.0, 16.0]


def test_crowds_and_what_lies_outside_are_left_out(tmp_path: Path) -> None:
    document = annotation_document(IMAGES, NAMES)
    document["annotations"][0]["iscrowd"] = 1
    document["annotations"][1]["bbox"] = [-10, 10, 40, 100]
    document["annotations"].append({"image_id": 7, "category_id": 1, "bbox": [70, 0, 5, 5]})
    (tmp_path / "coco.json").write_text(json.dumps(document))
    layout = read_coco(tmp_path / "coco.json").images[0].layout
    assert layout.labels == ["dog"]
    assert layout.boxes[0] == pytest.approx((0.0, 10 / 32, 30 / 64, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "it needs the lists images"),
        (lambda d: d.update(images={}), "it needs the lists"),
        (lambda d: d["images"][0].pop("width"), "'width' is no int"),
        (lambda d: d["images"].append(d["images"][0]), "image 7 twice"),
        (lambda d: d["images"][0].update(width=0), "without a size"),
        (lambda d: d["categories"].append({"id": 2, "name": "cow"}), "twice"),
        (lambda d: d["categories"].append(3), "'name' is no str"),
        (lambda d: d["annotations"][0].update(image_id=1), "one of which it lacks"),
        (lambda d: d["annotations"][0].update(category_id=True), "'category_id' is no int"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "Give x, y, width, height"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "Give x, y, width, height"),
        (lambda d: d["annotations"][0].update(bbox="1234"), "Give x, y, width, height"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: Any, message: str) -> None:
    document = annotation_document(IMAGES, NAMES)
    change(document)
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_coco(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_said(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "coco.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"coco\.json is no "):
        read_coco(file)


def test_figures_of_right_shifted_and_missing_boxes() -> None:
    reference = annotation_document(IMAGES, NAMES)
    assert average_precision(reference, results(IMAGES))["AP"] == pytest.approx(1.0)
    shifted = average_precision(reference, results(IMAGES, 0.05))
    assert shifted["AP50"] == pytest.approx(1.0)
    assert shifted["AP"] < 0.9
    assert average_precision(reference, results(IMAGES)[:1])["AP50"] == pytest.approx(0.5)  # a class is missed
    assert average_precision(reference, [])["AP"] == 0
    with pytest.raises(ValueError, match="image 3"):
        average_precision(reference, [{"image_id": 3, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}])
    with pytest.raises(ValueError, match="no objects"):
        average_precision(annotation_document(IMAGES[1:], NAMES), [])


def test_scenes_are_written_with_their_annotations(tmp_path: Path) -> None:
    scenes.write(tmp_path, "test", 3, seed=1)
    data, batch = read_coco(tmp_path / "coco.json"), scenes.draw("test", 3, seed=1)
    for image, pixels_, labels in zip(data.images, batch.images, batch.labels, strict=True):
        assert image.layout.labels == [scenes.CLASSES[label] for label in labels.tolist()]
        with Image.open(tmp_path / image.file_name) as picture:
            shown = torch.tensor(list(picture.convert("RGB").getdata())).view(64, 64, 3).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(shown, pixels_, atol=0.01, rtol=0)
