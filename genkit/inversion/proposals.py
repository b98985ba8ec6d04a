"""Where a layout does not explain a picture: boxes to try, from a diffusion model's own errors.

A model that is told of too few objects denoises the others badly. The places with the largest errors, connected, are proposals: no
detector is trained. At a high threshold what touches falls apart, at a low one a thin stroke stays whole; all thresholds propose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

LEVELS = (0.15, 0.3, 0.45, 0.6)  # thresholds between the median and the upper end of the errors
LEAST = 3  # places of a proposal


def propose(surprise: Tensor, levels: Sequence[float] = LEVELS, most: int = 12, same: float = 0.75) -> Tensor:
    """Boxes (K, 4), x0, y0, x1, y1 from 0 to 1, the most surprising first.

    Args:
        surprise: errors (h, w) at each place, see `LayoutLoss.maps`.
        levels: thresholds, as fractions of the way from the median to the upper end (the 98th percentile).
        most: boxes at most.
        same: IoU from which the smaller surprise of two boxes is left out.
    """
    values = surprise.double().cpu().numpy()
    low, high = np.median(values), np.quantile(values, 0.98)
    boxes, sums = [], []
    for level in levels:
        threshold = low + level * (high - low)
        regions, _ = ndimage.label(values > threshold, structure=np.ones((3, 3)))
        for number, found in enumerate(ndimage.find_objects(regions), 1):
            inside = regions[found] == number
            if found is None or inside.sum() < LEAST:
                continue
            rows, columns = found
            boxes.append(
                [
                    columns.start / values.shape[1],
                    rows.start / values.shape[0],
                    columns.stop / values.shape[1],
                    rows.stop / values.shape[0],
                ]
            )
            sums.append(float((values[found] - low)[inside].sum()))
    if not boxes:
        return torch.zeros(0, 4)
    found_boxes, scores = torch.tensor(boxes), torch.tensor(sums)
    kept = batched_nms(found_boxes, scores, torch.zeros(len(scores), dtype=torch.long), same)
    return found_boxes[kept[:most]]


def new(boxes: Tensor, known: Tensor, same: float = 0.6) -> Tensor:
    """The boxes (K, 4) that are none of those known (M, 4)."""
    return boxes if not len(known) or not len(boxes) else boxes[box_iou(boxes, known).amax(1) < same]
