"""Parts that may stand for each other, and which of them stands for which.

Two parts are of one geometry class if they have one semantic class and their boxes differ by less than a tenth (the rule of the
PartNet assembly benchmark). Inside a class the prediction is matched with the truth so that the sum of the Chamfer distances is
least (the assignment problem; Kuhn 1955).
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from genkit.assembly.distances import chamfer

TOLERANCE = 0.1
MATCH_POINTS = 100  # of each part that are compared, as the benchmark has


def geometry_classes(extents: Tensor, classes: Tensor | None = None) -> Tensor:
    """Numbers (P,), from 0, equal for parts of one class (P,) whose sides (P, 3) differ by less than a tenth of the longest."""
    ids = torch.full((len(extents),), -1)
    sides = extents.sort(-1).values
    for i in range(len(extents)):
        if ids[i] >= 0:
            continue
        alike = (sides - sides[i]).abs().amax(-1) < TOLERANCE * sides.amax(-1).maximum(sides[i].max())
        if classes is not None:
            alike &= classes == classes[i]
        ids[alike & (ids < 0)] = int(ids.max()) + 1
    return ids


def match_parts(predicted: Tensor, true: Tensor, geometry_ids: Tensor, skip: tuple[int, ...] = ()) -> list[int]:
    """Of each predicted part, which true part it stands for.

    Args:
        predicted, true: points of the assembled parts (P, N, 3).
        geometry_ids: (P,).
        skip: ids whose parts are not matched but stand for themselves.
    """
    match = list(range(len(predicted)))
    few = [points[:, :MATCH_POINTS] for points in (predicted, true)]
    for geometry in sorted(set(geometry_ids.tolist()) - set(skip)):
        members = (geometry_ids == geometry).nonzero().flatten().tolist()
        if len(members) > 1:
            cost = torch.stack([torch.stack([chamfer(few[0][i], few[1][j]) for j in members]) for i in members])
            rows, columns = linear_sum_assignment(cost.numpy())
            for row, column in zip(rows, columns, strict=True):
                match[members[row]] = members[column]
    return match
