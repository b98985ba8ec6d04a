"""Parts of furniture: closed meshes of primitives, exact, in their places."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from trimesh import Trimesh

_ROUND = 32  # sides of a cylinder


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A part: a primitive centred at the origin, turned, then moved.

    Args:
        kind: box (sides), cylinder (radius, height), taper (lower radius, upper radius, height), slab (sides; corners rounded,
            along y), shade (lower radius, upper radius, height, wall), ball (radius). Round ones stand along y.
        size: the numbers in brackets.
        rotation: (3, 3).
        centre: (3,).
        semantic: one of `SEMANTICS`.
    """

    kind: str
    size: tuple[float, ...]
    rotation: np.ndarray
    centre: np.ndarray
    semantic: str

    @property
    def mesh(self) -> Trimesh:
        """The exact mesh, in place."""
        mesh = _PRIMITIVES[self.kind](*self.size)
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.rotation, self.centre
        mesh.apply_transform(pose)
        return mesh


def _turned(profile: list[tuple[float, float]]) -> Trimesh:
    """A closed surface of revolution about y of a profile (radius, height)."""
    import trimesh

    mesh = trimesh.creation.revolve(np.array(profile), sections=_ROUND)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(-math.pi / 2, [1, 0, 0]))
    return mesh


def _slab(width: float, thick: float, depth: float) -> Trimesh:
    """A board with rounded corners: the hull of a superellipse |x|^4 + |z|^4 = 1 at both faces."""
    import trimesh

    t = np.linspace(0, 2 * math.pi, _ROUND, endpoint=False)
    x, z = (np.sign(f) * np.sqrt(np.abs(f)) for f in (np.cos(t), np.sin(t)))
    rim = np.stack([x * width / 2, np.full(_ROUND, thick / 2), z * depth / 2], 1)
    return trimesh.convex.convex_hull(np.concatenate([rim, rim * [1, -1, 1]]))


def _box(*sides: float) -> Trimesh:
    import trimesh

    return trimesh.creation.box(sides)


def _taper(lower: float, upper: float, height: float) -> Trimesh:
    return _turned([(0, -height / 2), (lower, -height / 2), (upper, height / 2), (0, height / 2)])


def _shade(lower: float, upper: float, height: float, wall: float) -> Trimesh:
    low, high = -height / 2, height / 2
    return _turned([(0, high - wall), (upper - wall, high - wall), (lower - wall, low), (lower, low), (upper, high), (0, high)])


def _ball(radius: float) -> Trimesh:
    import trimesh

    return trimesh.creation.icosphere(subdivisions=2, radius=radius)


def _cylinder(radius: float, height: float) -> Trimesh:
    return _taper(radius, radius, height)


_PRIMITIVES: dict[str, Callable[..., Any]] = {
    "box": _box, "slab": _slab, "taper": _taper, "cylinder": _cylinder, "shade": _shade, "ball": _ball,
}  # fmt: skip
