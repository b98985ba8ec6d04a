"""Where a layout does not explain a picture: boxes to try, from a diffusion model's own errors.

A model that is told of too few objects denoises the others badly. The places with the largest errors, connected, are proposals: no
detector is trained. At a high threshold what touches falls apart, at a low one a thin stroke stays whole; all thresholds propose.
Objects that no threshold parts are still blobs: peaks of the Laplacian of Gaussians over places and scales (Lindeberg 1998,
Feature Detection with Automatic Scale Selection), each of which is a box, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou, nms

LEVELS = (0.15, 0.3, 0.45, 0.6)  # thresholds between the median and the upper end of the errors
LEAST = 3  # places of a proposal
SCALES = (0.1, 0.13, 0.16, 0.19)  # standard deviations of blobs, in units of the picture's side
EXTENT = 1.6  # standard deviations from a blob's centre to the sides of its box


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
    kept = nms(found_boxes, scores, same)
    return found_boxes[kept[:most]]


def blobs(surprise: Tensor, scales: Sequence[float] = SCALES, most: int = 4, same: float = 0.5) -> Tensor:
    """Square boxes (K, 4) around the blobs of `surprise` (h, w), where positive; the strongest first.

    Args:
        scales: standard deviations of the Gaussians.
        most: boxes at most.
        same: IoU from which the weaker of two is left out.
    """
    values = surprise.double().clamp(min=0).cpu().numpy()
    sigmas = [scale * max(values.shape) for scale in scales]
    # Times sigma^2, responses at different scales compare.
    response = np.stack([-(sigma**2) * ndimage.gaussian_laplace(values, sigma, mode="constant") for sigma in sigmas])
    peaks = (response == ndimage.maximum_filter(response, size=3)) & (response > 0)
    scale, *places = (torch.from_numpy(axis) for axis in np.nonzero(peaks))
    if not len(scale):
        return torch.zeros(0, 4)
    size = torch.tensor(values.shape[::-1])
    centres, half = torch.stack(places[::-1], 1) + 0.5, EXTENT * torch.tensor(sigmas)[scale, None]
    boxes = torch.cat([(centres - half) / size, (centres + half) / size], 1).clamp(0, 1).float()
    kept = nms(boxes, torch.from_numpy(response[peaks]).float(), same)
    return boxes[kept[:most]]


def new(boxes: Tensor, known: Tensor, same: float = 0.6) -> Tensor:
    """The boxes (K, 4) that are none of those known (M, 4)."""
    return boxes if not len(known) or not len(boxes) else boxes[box_iou(boxes, known).amax(1) < same]
