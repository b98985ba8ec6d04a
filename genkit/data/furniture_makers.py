"""How a chair, a table, a lamp and a cabinet are put together; `genkit.data.furniture` draws them.

Each function draws its structure and sizes from the maker's random numbers, adds the pieces with what they touch, and returns the
structure: two words that the held-out combinations are told by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from genkit.data.furniture_pieces import Piece


class Maker:
    """Pieces and contacts while they are put together."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pieces: list[Piece] = []
        self.contacts: dict[tuple[int, int], np.ndarray] = {}

    def size(self, low: float, high: float) -> float:
        """Log-uniform."""
        return float(np.exp(self.rng.uniform(math.log(low), math.log(high))))

    def one_of(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def add(
        self,
        kind: str,
        size: tuple[float, ...],
        centre: Any,
        semantic: str,
        turn: np.ndarray | None = None,
        on: dict[int, Any] | None = None,
    ) -> int:
        """A piece, and what it touches: `{other: point}`. Returns its number."""
        number = len(self.pieces)
        self.pieces.append(Piece(kind, size, np.eye(3) if turn is None else turn, np.array(centre, dtype=float), semantic))
        for other, place in (on or {}).items():
            self.contacts[min(other, number), max(other, number)] = np.array(place, dtype=float)
        return number

    def bar(
        self, kind: str, thick: float, a: Any, b: Any, semantic: str, on: dict[int, Any] | None = None, wide: float | None = None
    ) -> int:
        """A box or cylinder along y, laid from a to b; a box's other side stays as level as it can."""
        a, b = np.array(a, dtype=float), np.array(b, dtype=float)
        length = float(np.linalg.norm(b - a))
        along = (b - a) / length
        side = np.cross(along, [0.0, 0, 1] if abs(along[2]) < 0.9 else [1.0, 0, 0])
        side /= np.linalg.norm(side)
        turn = np.stack([side, along, np.cross(side, along)], 1)
        sizes = {
            "box": (wide or thick, length, thick), "cylinder": (thick / 2, length), "taper": (thick / 3, thick / 2, length)
        }  # fmt: skip
        return self.add(kind, sizes[kind], (a + b) / 2, semantic, turn, on)

    def connected(self) -> bool:
        reached, todo = {0}, [0]
        while todo:
            here = todo.pop()
            for pair in self.contacts:
                if here in pair:
                    other = pair[0] + pair[1] - here
                    if other not in reached:
                        reached.add(other)
                        todo.append(other)
        return len(reached) == len(self.pieces)


def _board(m: Maker, kind: str, width: float, depth: float, thick: float, under: float, semantic: str) -> int:
    """A level board whose underside is at a height."""
    size = {"box": (width, thick, depth), "slab": (width, thick, depth), "cylinder": (min(width, depth) / 2, thick)}[kind]
    return m.add(kind, size, (0, under + thick / 2, 0), semantic)


def _corners(kind: str, width: float, depth: float, inset: float, count: int = 4) -> list[tuple[float, float]]:
    """Where legs stand under a board (x, z)."""
    if kind == "cylinder" or count != 4:
        radius = 0.7 * min(width, depth) / 2
        angles = [2 * math.pi * (k + 0.5) / count for k in range(count)]
        return [(radius * math.cos(t), radius * math.sin(t)) for t in angles]
    x, z = width / 2 - inset, depth / 2 - inset
    return [(-x, -z), (-x, z), (x, -z), (x, z)]


def _legs(
    m: Maker, board: int, spots: list[tuple[float, float]], kind: str, thick: float, height: float, splay: float
) -> list[int]:
    """Legs from the board's underside to the floor, leaning outwards by `splay`."""
    legs = []
    for x, z in spots:
        out = np.array([x, 0, z]) / max(math.hypot(x, z), 1e-6) * math.tan(splay) * height
        top = np.array([x, height, z])
        legs.append(m.bar(kind, thick, [x + out[0], 0, z + out[2]], top, "leg", {board: top}))
    return legs


def _star(m: Maker, board: int, height: float, reach: float, thick: float) -> None:
    """A column with feet around it."""
    column = m.bar("cylinder", thick, (0, 0.06, 0), (0, height, 0), "column", {board: (0, height, 0)})
    count = m.one_of(4, 5)
    for k in range(count):
        t = 2 * math.pi * k / count
        inner, outer = thick / 2, reach
        a = np.array([math.cos(t), 0, math.sin(t)])
        m.bar("box", 0.035, inner * a + [0, 0.1, 0], outer * a + [0, 0.02, 0], "foot", {column: inner * a + [0, 0.1, 0]})


def _chair(m: Maker) -> tuple[str, str]:
    width, depth, thick, height = m.size(0.38, 0.55), m.size(0.38, 0.52), m.size(0.025, 0.08), m.size(0.38, 0.5)
    seat_kind = m.one_of("box", "box", "slab", "cylinder")
    if seat_kind == "cylinder":
        width = depth = min(width, depth)
    seat = _board(m, seat_kind, width, depth, thick, height, "seat")
    top, lean = height + thick, math.radians(m.rng.uniform(0, 15))
    back_kind = m.one_of("panel", "slats", "posts")
    _back(m, back_kind, seat, width * (0.7 if seat_kind == "cylinder" else 1.0), depth, top, lean)
    base = m.one_of("box", "cylinder", "taper", "star")
    leg_thick = m.size(0.025, 0.055)
    legs: list[int] = []
    if base == "star":
        _star(m, seat, height, 0.5 * max(width, depth), m.size(0.04, 0.08))
    else:
        splay = math.radians(m.rng.uniform(0, 8)) * m.one_of(0, 1)
        spots = _corners(seat_kind, width, depth, leg_thick)
        legs = _legs(m, seat, spots, base, leg_thick, height, splay)
        if seat_kind != "cylinder" and splay == 0:
            _stretchers(m, legs, spots, height * m.rng.uniform(0.25, 0.6), leg_thick)
    arms = seat_kind != "cylinder" and m.chance(0.3)
    if arms:
        _arms(m, seat, width, depth, top)
    return back_kind, base if base == "star" else ("tapered" if base == "taper" else base) + (", arms" if arms else "")


def _back(m: Maker, kind: str, seat: int, width: float, depth: float, top: float, lean: float) -> None:
    """The back stands on the seat's rear edge and leans by an angle."""
    tall, thick = m.size(0.3, 0.6), m.size(0.015, 0.04)
    up, z = np.array([0, math.cos(lean), -math.sin(lean)]), -depth / 2 + thick
    foot = np.array([0, top, z])

    def at(x: float, s: float) -> np.ndarray:
        return foot + np.array([x, 0, 0]) + s * up

    if kind == "panel":
        m.bar("box", thick, at(0, 0), at(0, tall), "back", {seat: foot}, wide=width * m.rng.uniform(0.75, 1.0))
        return
    if kind == "slats":
        rail_height = m.size(0.04, 0.09)
        count = int(m.rng.integers(3, 7))
        wide = m.size(0.02, 0.04)
        xs = np.linspace(-width / 2 + wide, width / 2 - wide, count)
        rail = m.bar("box", thick, at(0, tall), at(0, tall + rail_height), "rail", wide=width)
        for x in xs:
            m.bar("box", thick, at(x, 0), at(x, tall), "slat", {seat: at(x, 0), rail: at(x, tall)}, wide=wide)
        return
    post, x = m.size(0.025, 0.045), width / 2 - 0.03
    posts = [m.bar("box", post, at(s * x, 0), at(s * x, tall), "back", {seat: at(s * x, 0)}) for s in (-1, 1)]
    count, rail_height = int(m.rng.integers(1, 4)), m.size(0.04, 0.1)
    for s in np.linspace(tall - rail_height, max(0.3 * tall, tall - 3 * rail_height), count):
        ends = {posts[k]: at((x - post / 2) * (2 * k - 1), s + rail_height / 2) for k in (0, 1)}
        m.bar("box", thick, at(0, s), at(0, s + rail_height), "rail", ends, wide=2 * x - post)


def _stretchers(m: Maker, legs: list[int], spots: list[tuple[float, float]], height: float, thick: float) -> None:
    pairs = [(0, 1), (2, 3), (0, 2), (1, 3)][: int(m.one_of(0, 0, 2, 3, 4))]
    for i, j in pairs:
        a, b = (np.array([spots[k][0], height, spots[k][1]]) for k in (i, j))
        inset = thick / 2 * (b - a) / np.linalg.norm(b - a)
        m.bar("box", 0.6 * thick, a + inset, b - inset, "stretcher", {legs[i]: a + inset, legs[j]: b - inset})


def _arms(m: Maker, seat: int, width: float, depth: float, top: float) -> None:
    high, thick, wide = m.size(0.16, 0.24), m.size(0.02, 0.035), m.size(0.035, 0.06)
    length = depth * m.rng.uniform(0.6, 0.85)
    for side in (-1, 1):
        x = side * (width / 2 - wide / 2)
        foot, head = (x, top, 0.1 * depth), (x, top + high, 0.1 * depth)
        support = m.bar("box", thick, foot, head, "arm support", {seat: foot})
        m.add("box", (wide, thick, length), (x, top + high + thick / 2, 0), "arm", on={support: head})


def _table(m: Maker) -> tuple[str, str]:
    width, depth, thick, height = m.size(0.6, 1.6), m.size(0.5, 0.95), m.size(0.018, 0.05), m.size(0.4, 0.76)
    kind = m.one_of("box", "box", "slab", "cylinder")
    if kind == "cylinder":
        width = depth = m.size(0.5, 1.2)
    top = _board(m, kind, width, depth, thick, height, "top")
    if m.chance(0.25):
        foot = m.size(0.5, 0.7) * min(width, depth)
        if m.chance(0.5):
            _star(m, top, height, foot / 2 * 1.2, m.size(0.05, 0.1))
        else:
            base = m.add("cylinder", (foot / 2, 0.03), (0, 0.015, 0), "foot")
            ends = {top: (0, height, 0), base: (0, 0.03, 0)}
            m.bar("cylinder", m.size(0.05, 0.12), (0, 0.03, 0), (0, height, 0), "column", ends)
        return _short(kind), "pedestal"
    leg, count = m.size(0.035, 0.09), 4 if kind != "cylinder" else int(m.rng.integers(3, 7))
    spots, leg_kind = _corners(kind, width, depth, leg, count), m.one_of("box", "cylinder", "taper")
    legs = _legs(m, top, spots, leg_kind, leg, height, 0.0)
    extra = "plain"
    if kind != "cylinder" and leg_kind == "box" and m.chance(0.5):
        _aprons(m, top, legs, spots, height, leg)
    if m.chance(0.3):
        extra = "shelf"
        level = height * m.rng.uniform(0.2, 0.45)
        reach = 2 * abs(spots[0][0]) - leg, 2 * abs(spots[0][1]) - leg
        shape, size = (
            ("cylinder", (math.hypot(*spots[0]) - leg / 2, 0.02))
            if kind == "cylinder"
            else ("box", (reach[0], 0.02, 2 * spots[1][1]))
        )
        touch = {n: (x * 0.97, level, z) for n, (x, z) in zip(legs, spots, strict=True)}
        m.add(shape, size, (0, level, 0), "shelf", on=touch)
    elif kind == "box" and m.chance(0.3):
        extra = "drawer"
        for k in range(int(m.rng.integers(1, 3))):
            x = (0.0, 0.5)[k] * width * 0.5
            m.add(
                "box",
                (0.22 * width, 0.1, 0.6 * depth),
                (x - 0.1 * width, height - 0.05, 0),
                "drawer",
                on={top: (x - 0.1 * width, height, 0)},
            )
    return _short(kind), extra


def _short(kind: str) -> str:
    return "disc" if kind == "cylinder" else kind


def _aprons(m: Maker, top: int, legs: list[int], spots: list[tuple[float, float]], height: float, leg: float) -> None:
    tall, thick = m.size(0.05, 0.1), 0.02
    for i, j in ((0, 1), (2, 3), (0, 2), (1, 3)):
        a, b = (np.array([spots[k][0], height - tall / 2, spots[k][1]]) for k in (i, j))
        inset = leg / 2 * (b - a) / np.linalg.norm(b - a)
        a, b = a + inset, b - inset
        size = (thick, tall, b[2] - a[2]) if abs(b[2] - a[2]) > abs(b[0] - a[0]) else (b[0] - a[0], tall, thick)
        m.add("box", size, (a + b) / 2, "apron", on={legs[i]: a, legs[j]: b, top: (a + b) / 2 + [0, tall / 2, 0]})


def _lamp(m: Maker) -> tuple[str, str]:
    base_kind = m.one_of("cylinder", "box")
    reach, thick = m.size(0.12, 0.2), m.size(0.015, 0.05)
    base = m.add(
        base_kind, (reach, thick) if base_kind == "cylinder" else (1.8 * reach, thick, 1.8 * reach), (0, thick / 2, 0), "base"
    )
    height, pole = thick, m.size(0.015, 0.035)
    under, segments = base, int(m.rng.integers(1, 4))
    tall = m.size(0.3, 1.4) / segments
    for _ in range(segments):
        under = m.bar("cylinder", pole, (0, height, 0), (0, height + tall, 0), "pole", {under: (0, height, 0)})
        height, pole = height + tall, 0.85 * pole
    up = np.array([0, 1.0, 0])
    hang = height * up
    kind = m.one_of("straight", "arm")
    if kind == "arm":
        tilt, length = math.radians(m.rng.uniform(20, 75)), m.size(0.2, 0.45)
        end = hang + length * np.array([math.cos(tilt), math.sin(tilt), 0])
        under = m.bar("cylinder", 0.8 * pole, hang, end, "lamp arm", {under: hang})
        hang = end
    wide, tall = m.size(0.1, 0.22), m.size(0.12, 0.28)
    radius = m.size(0.025, 0.04)
    bulb = m.add("ball", (radius,), hang + up * radius, "bulb", on={under: hang})
    upper = wide * m.rng.uniform(0.4, 0.95)
    # The shade rests on the bulb's crown by a plate: it is closed above.
    m.add(
        "shade",
        (wide, upper, tall, 0.006),
        hang + up * (2 * radius + 0.006 - tall / 2),
        "shade",
        on={bulb: hang + up * 2 * radius},
    )
    return _short(base_kind), kind


def _cabinet(m: Maker) -> tuple[str, str]:
    width, depth, tall, t = m.size(0.4, 1.2), m.size(0.25, 0.5), m.size(0.5, 1.8), m.size(0.015, 0.03)
    feet = m.chance(0.4)
    floor = m.size(0.05, 0.12) if feet else 0.0
    bottom = m.add("box", (width, t, depth), (0, floor + t / 2, 0), "bottom")
    inner = tall - 2 * t
    middle = floor + t + inner / 2
    sides = [
        m.add("box", (t, inner, depth), (s * (width - t) / 2, middle, 0), "side", on={bottom: (s * (width - t) / 2, floor + t, 0)})
        for s in (-1, 1)
    ]
    head = floor + tall - t
    m.add(
        "box",
        (width, t, depth),
        (0, head + t / 2, 0),
        "top",
        on={side: (s * (width - t) / 2, head, 0) for s, side in zip((-1, 1), sides, strict=True)},
    )
    clear = width - 2 * t
    if m.chance(0.7):
        touch: dict[int, Any] = {bottom: (0, floor + t, -depth / 2 + t / 4)}
        touch |= {side: (s * clear / 2, middle, -depth / 2 + t / 4) for s, side in zip((-1, 1), sides, strict=True)}
        m.add("box", (clear, inner, t / 2), (0, middle, -depth / 2 + t / 4), "back panel", on=touch)
    for k in range(count := int(m.rng.integers(0, 5))):
        y = floor + t + inner * (k + 1) / (count + 1)
        touch = {side: (s * clear / 2, y, 0) for s, side in zip((-1, 1), sides, strict=True)}
        m.add("box", (clear, t, 0.9 * depth), (0, y, 0.03 * depth), "shelf", on=touch)
    doors = int(m.rng.integers(0, 3))
    for k in range(doors):
        s = (-1, 1)[k]
        wide = width / doors - 0.004
        x = 0.0 if doors == 1 else s * width / 4
        door = m.add(
            "box",
            (wide, tall - 0.004, t),
            (x, floor + tall / 2, depth / 2 + t / 2),
            "door",
            on={sides[k]: (s * (width - t) / 2, middle, depth / 2)},
        )
        grip = x - s * (wide / 2 - 0.04)
        m.bar(
            "cylinder",
            0.015,
            (grip, middle - 0.06, depth / 2 + t + 0.0075),
            (grip, middle + 0.06, depth / 2 + t + 0.0075),
            "handle",
            {door: (grip, middle, depth / 2 + t)},
        )
    if feet:
        thick = m.size(0.03, 0.06)
        for x, z in _corners("box", width, depth, thick):
            m.bar("box", thick, (x, 0, z), (x, floor, z), "leg", {bottom: (x, floor, z)})
    return ("no doors", "one door", "two doors")[doors], "feet" if feet else "plain"


MAKERS: dict[str, Callable[[Maker], tuple[str, str]]] = {"chair": _chair, "table": _table, "lamp": _lamp, "cabinet": _cabinet}
