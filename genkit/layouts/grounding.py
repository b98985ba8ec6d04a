"""How a layout-conditioned model is told of layouts of certain classes: what every detector by inversion needs of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from genkit.denoisers.base import Cond


@dataclasses.dataclass(frozen=True, eq=False)
class Grounding:
    """Layouts of some classes, for a model.

    Args:
        class_names: what can be found.
        slots: most objects of a layout.
        condition: from packed layouts (B, N, 5), N at most `slots`, whose classes are numbers in `class_names`, to the model's
            condition; differentiable in the boxes.
        unknown: the condition (one row) of which nothing is known; None for a model that cannot tell it from an empty layout.
    """

    class_names: list[str]
    slots: int
    condition: Callable[[Tensor], Cond]
    unknown: Cond | None = None
