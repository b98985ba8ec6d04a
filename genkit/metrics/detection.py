"""Average precision of detections, by pycocotools (Lin et al. 2014, arXiv 1405.0312)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

KEYS = {"AP": 0, "AP50": 1, "AP75": 2, "AR": 8}  # places in `COCOeval.stats`; AP is the mean over IoU from 0.5 to 0.95


def average_precision(reference: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COCO's figures.

    Args:
        reference: the document of an annotation file, see `genkit.data.coco`.
        results: detections {image_id, category_id, bbox, score}. Images of the reference without any count as missed.

    Returns:
        AP (IoU 0.50 to 0.95), AP50, AP75, AR (at most 100 detections a picture), from 0 to 1.

    Raises:
        ImportError: pycocotools is not installed.
        ValueError: a detection of an image that the reference lacks, or a reference without objects.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("Average precision needs pycocotools. Install it with: pip install 'genkit-diffusion[detect]'") from error
    if not reference["annotations"]:
        raise ValueError("The reference has no objects, so there is no precision. Give one with annotations.")
    unknown = {row["image_id"] for row in results} - {image["id"] for image in reference["images"]}
    if unknown:
        raise ValueError(f"There are detections of image {min(unknown)}, which the reference lacks.")
    if not results:
        return dict.fromkeys(KEYS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **reference}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(row) for row in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(evaluation.stats[place]) for name, place in KEYS.items()}
