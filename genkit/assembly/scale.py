"""How many times larger than the parts a template is."""

from __future__ import annotations

import math

from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import PartSet
from genkit.assembly.surfaces import part_surface
from genkit.assembly.units import ratio_near

_SAME_SCALE = (0.6, 1.6)  # a scan may lack hidden faces, and its area is an estimate; other units differ by more


def scale_of(parts: PartSet, template: Surface) -> float:
    """How many times larger than the parts a template is that may be a scan of them; 1 where it is about as large.

    Where it is measured in other units, most likely, it is their ratio: areas alone tell the scale to some percent only.
    """
    scale = area_scale(parts, template)
    return 1.0 if _SAME_SCALE[0] < scale < _SAME_SCALE[1] else ratio_near(scale)


def area_scale(parts: PartSet, template: Surface) -> float:
    """How many times larger than the parts a template is, by areas.

    The area of a cloud is estimated, and comes out too small where boards are thinner than its points are apart (to a quarter on
    some furniture); so the parts' area is estimated from samples that are as sparse.
    """
    total, shown = float(parts.areas.sum()), 0.0
    for i, area in enumerate(parts.areas.tolist()):
        surface = part_surface(parts, i)
        count = min(len(surface), max(32, round(len(template) * area / total)))
        shown += float(Surface(surface.points[:count], surface.normals[:count]).areas.sum())
    return math.sqrt(float(template.areas.sum()) / shown)
