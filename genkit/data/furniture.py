"""Furniture from parameters: chairs, tables, lamps and cabinets of 2 to 20 parts, with exact meshes, contacts and classes.

A piece of furniture is drawn from its category and a seed alone: first a structure (what parts there are, of what kind), then
sizes, in metres, y up, on the floor y = 0. Sizes are log-uniform. Each part is a primitive in a pose and knows what it touches,
and where.

Splits never share a seed. Some combinations of structure are held out: `train`, `val` and `test` never draw one, `held-out`
nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import invert, transform
from genkit.data.furniture_makers import MAKERS, Maker
from genkit.data.furniture_pieces import Piece
from genkit.errors import unknown

if TYPE_CHECKING:
    from trimesh import Trimesh

CATEGORIES = ("chair", "table", "lamp", "cabinet")
SPLITS = ("train", "val", "test", "held-out")
SEMANTICS = (
    "seat", "back", "slat", "rail", "leg", "stretcher", "column", "foot", "arm", "arm support",
    "top", "apron", "shelf", "drawer", "base", "pole", "lamp arm", "shade", "bulb",
    "side", "bottom", "back panel", "door", "handle",
)  # fmt: skip
MOST_PARTS = 20
_HELD_OUT = {
    "chair": {("slats", "star"), ("panel", "tapered, arms")},
    "table": {("disc", "shelf"), ("box", "pedestal")},
    "lamp": {("box", "arm")},
    "cabinet": {("two doors", "feet")},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Furniture:
    """A piece of furniture.

    Args:
        structure: what the held-out combinations are told by.
        pieces: its parts.
        contacts: `{(i, j): point}`, i < j, where parts touch.
    """

    category: str
    seed: int
    structure: tuple[str, str]
    pieces: list[Piece]
    contacts: dict[tuple[int, int], np.ndarray]

    @property
    def meshes(self) -> list[Trimesh]:
        """Exact meshes of the parts in assembled pose."""
        return [piece.mesh for piece in self.pieces]

    def cloud(self, points: int, seed: int = 0) -> Tensor:
        """Area-uniform samples (points, 3) of all surfaces, in metres."""
        import trimesh

        return torch.from_numpy(
            np.array(trimesh.sample.sample_surface(trimesh.util.concatenate(self.meshes), points, seed=seed)[0])
        ).float()

    def parts(self, *, seed: int = 0, points: int = 1000) -> PartSet:
        """The parts with their true poses, contacts, classes and category."""
        classes = torch.tensor([SEMANTICS.index(piece.semantic) + 1 for piece in self.pieces])
        names = [f"{i:02d} {piece.semantic}" for i, piece in enumerate(self.pieces)]
        parts = PartSet.from_meshes(
            self.meshes, names, truth=True, seed=seed, points=points, classes=classes, category=self.category
        )
        contacts = torch.zeros(len(parts), len(parts), 4)
        back = invert(parts.frames)
        for (i, j), place in self.contacts.items():
            world = torch.from_numpy(place / parts.unit)[None]
            for a, b in ((i, j), (j, i)):
                contacts[a, b, 0], contacts[a, b, 1:] = 1, transform(world, back[a])[0].float()
        return dataclasses.replace(parts, contacts=contacts)


def draw(category: str, seed: int, split: str = "train") -> Furniture:
    """A piece of furniture; the same for the same arguments.

    Args:
        category: chair, table, lamp or cabinet.
        seed: from 0; each split has its own.
        split: train, val, test or held-out.

    Raises:
        ValueError: an unknown category or split, or a negative seed.

    Example:
        >>> draw("chair", 3).parts().names
    """
    if category not in CATEGORIES:
        raise unknown("category", category, CATEGORIES)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if seed < 0:
        raise ValueError(f"The seed {seed} must not be negative.")
    for attempt in range(1000):
        rng = np.random.default_rng([CATEGORIES.index(category), SPLITS.index(split), seed, attempt])
        made = Maker(rng)
        structure = MAKERS[category](made)
        held_out = structure in _HELD_OUT[category]
        if held_out == (split == "held-out") and 2 <= len(made.pieces) <= MOST_PARTS and made.connected():
            return Furniture(category, seed, structure, made.pieces, made.contacts)
    raise RuntimeError(f"No {category} of the split {split!r} was drawn in 1,000 attempts.")
