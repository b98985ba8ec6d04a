"""COCO's format of boxes (cocodataset.org, format-data and format-results).

annotations   {"images": [{id, file_name, width, height}], "categories": [{id, name}],
               "annotations": [{id, image_id, category_id, bbox: [x, y, width, height] in pixels, area, iscrowd}]}
results       [{image_id, category_id, bbox, score}]
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genkit.files import write_atomic
from genkit.layouts.layout import Layout

MAX_BYTES = 2 * 2**30  # of a file: COCO's own are 0.5 GB
_MOST = 10**7  # pixels along a side, and of a box's coordinates


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """A picture of an annotation file: id, file name, size in pixels, and its objects (crowds and empty boxes left out)."""

    id: int
    file_name: str
    width: int
    height: int
    layout: Layout


@dataclasses.dataclass(frozen=True)
class CocoData:
    """An annotation file.

    Args:
        images: its pictures.
        categories: id of each class name, in the order of the file.
        document: the file as it is, for pycocotools.
    """

    images: list[CocoImage]
    categories: dict[str, int]
    document: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        return list(self.categories)


def read_coco(file: Path) -> CocoData:
    """Read an annotation file.

    Raises:
        ValueError: it is no such file, or an entry of it is wrong; the message says which.
        OSError: it cannot be read.

    Example:
        >>> data = read_coco(Path("annotations/instances_val2017.json"))
        >>> data.images[0].layout, data.class_names[:3]
    """
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that are read.")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}). Give a COCO annotation file.") from error
    tables = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(name), list) for name in tables):
        raise ValueError(f"{file} is no COCO annotation file: it needs the lists {', '.join(tables)}.")
    categories: dict[str, int] = {}
    names: dict[int, str] = {}
    for entry in document["categories"]:
        name, number = _field(entry, "name", str, file), _field(entry, "id", int, file)
        if name in categories or number in names:
            raise ValueError(f"{file} has the category {name!r} or its id {number} twice. Give each once.")
        categories[name], names[number] = number, name
    sizes: dict[int, tuple[str, int, int]] = {}
    for entry in document["images"]:
        image_id, width, height = (_field(entry, name, int, file) for name in ("id", "width", "height"))
        if image_id in sizes or min(width, height) < 1 or max(width, height) > _MOST:
            raise ValueError(f"{file} has image {image_id} twice, or without a size that is possible ({width} x {height}).")
        sizes[image_id] = (_field(entry, "file_name", str, file), width, height)
    objects: dict[int, list[tuple[str, tuple[float, ...]]]] = {image_id: [] for image_id in sizes}
    for entry in document["annotations"]:
        image_id, category = _field(entry, "image_id", int, file), _field(entry, "category_id", int, file)
        if image_id not in sizes or category not in names:
            raise ValueError(f"{file} has an annotation of image {image_id} and category {category}, one of which it lacks.")
        box = _box(entry, sizes[image_id][1:], file)
        if box is not None and not entry.get("iscrowd"):
            objects[image_id].append((names[category], box))
    images = [
        CocoImage(image_id, *size, Layout([name for name, _ in objects[image_id]], [box for _, box in objects[image_id]]))
        for image_id, size in sizes.items()
    ]
    return CocoData(images, categories, document)


def annotation_document(images: Sequence[CocoImage], class_names: Sequence[str]) -> dict[str, Any]:
    """The document of an annotation file; categories are numbered from 1, as COCO's are."""
    rows = [(image, label, box) for image in images for label, box in zip(image.layout.labels, image.layout.boxes, strict=True)]
    numbers = {name: k + 1 for k, name in enumerate(class_names)}
    entries = []
    for number, (image, label, box) in enumerate(rows, 1):
        name = label if isinstance(label, str) else class_names[label]
        bbox = pixels(box, image.width, image.height)
        entries.append(
            {
                "id": number,
                "image_id": image.id,
                "category_id": numbers[name],
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": 0,
            }
        )
    return {
        "images": [{"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in images],
        "annotations": entries,
        "categories": [{"id": k, "name": name} for name, k in numbers.items()],
    }


def write_coco(file: Path, images: Sequence[CocoImage], class_names: Sequence[str]) -> None:
    """Write an annotation file."""
    write_atomic(file, (json.dumps(annotation_document(images, class_names)) + "\n").encode())


def pixels(box: Sequence[float], width: int, height: int) -> list[float]:
    """COCO's x, y, width, height in pixels of a box x0, y0, x1, y1 from 0 to 1."""
    x0, y0, x1, y1 = (float(value) for value in box)
    return [round(value, 4) for value in (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)]


def _field(entry: Any, name: str, kind: type, file: Path) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{file} has an entry whose {name!r} is no {kind.__name__}: {str(entry)[:80]}.")
    return value


def _box(entry: dict[str, Any], size: tuple[int, ...], file: Path) -> tuple[float, ...] | None:
    """x0, y0, x1, y1 from 0 to 1, cut at the picture's border; None where nothing of it is left."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) and -_MOST <= v <= _MOST for v in box):
        raise ValueError(f"{file} has the box {str(box)[:80]}. Give x, y, width, height in pixels.")
    x, y, width, height = box
    sides = [x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1]]
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in sides)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
