"""Lengths that meshes are measured in. Their files rarely say which, so two scans of one object may differ by 1000 or by 25.4."""

from __future__ import annotations

import itertools
import math

from genkit.errors import unknown

METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0, "in": 0.0254, "ft": 0.3048}
NEAR = 1.1  # an estimate by areas is off by some percent; ratios of two units differ by a fifth at least


def metres(unit: str) -> float:
    """Length of a unit.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in METRES:
        raise unknown("unit", unit, METRES)
    return METRES[unit]


def ratio_near(scale: float) -> float:
    """The ratio of two units that an estimated scale is within a tenth of; the scale itself where there is none."""
    ratios = {a / b for a, b in itertools.permutations(METRES.values(), 2)}
    closest = min(ratios, key=lambda ratio: abs(math.log(scale / ratio)))
    return closest if abs(math.log(scale / closest)) < math.log(NEAR) else scale
