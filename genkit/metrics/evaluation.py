"""The distances of a sample to a reference by name, and whether the sample is large enough for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genkit.metrics.estimate import REPLICATES, Estimate, bootstrap_mean
from genkit.metrics.frechet import frechet_estimate
from genkit.metrics.kernel import LEAST, SUBSET, kernel_distance, subset_size
from genkit.metrics.manifold import K, Manifold, expected_coverage

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
_OF_MANIFOLD = METRICS[2:]
LARGE = 1000  # samples below which neighbours are far away; Kynkaanniemi et al. 2019 have 50,000, Naeem et al. 2020 10,000
COVERED = 0.95  # what Naeem et al. want of the expected coverage


def evaluate(
    features: Tensor,
    reference: Tensor,
    metrics: Sequence[str] = METRICS,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
    k: int = K,
) -> dict[str, Estimate]:
    """Metrics of features (N, D) against those of a reference (M, D), with 95 % intervals.

    The intervals say how far a figure moves with another sample of this size: the reference is taken as it is. Those of precision,
    recall, density and coverage are of the mean over rows that they are, with the balls as they are.

    Args:
        metrics: of `METRICS`. "fid" is the Frechet distance and "kid" the kernel distance, of whatever features.
        replicates: of the bootstrap; 0 for no intervals but that of kid.
        k: which neighbour bounds a ball.

    Raises:
        ValueError: an unknown metric, fewer rows than it needs, or different widths.

    Example:
        >>> evaluate(backbone(images), backbone(real), ["fid", "recall"])["fid"]
        Estimate(value=0.16, low=0.15, high=0.18, count=1000)
    """
    for metric in metrics:
        if (message := impossible(metric, len(features), len(reference), k)) is not None:
            raise ValueError(message)
    found: dict[str, Estimate] = {}
    manifold = Manifold.of(features, reference, k) if set(metrics) & set(_OF_MANIFOLD) else None
    for metric in metrics:
        if metric == "fid":
            found[metric] = frechet_estimate(features, reference, replicates=replicates, seed=seed)
        elif metric == "kid":
            found[metric] = kernel_distance(features, reference, seed=seed)
        else:
            found[metric] = bootstrap_mean(getattr(manifold, metric), replicates=replicates, seed=seed)
    return found


def impossible(metric: str, count: int, reference: int, k: int = K) -> str | None:
    """Why a metric has no value for so many samples, or None.

    Raises:
        ValueError: an unknown metric.
    """
    from genkit.errors import unknown

    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    least = {"fid": 2, "kid": LEAST}.get(metric, k + 1)
    if min(count, reference) >= least:
        return None
    return f"{metric} needs at least {least} images on either side; there are {count}, and {reference} in the reference."


def shortage(metrics: Sequence[str], count: int, reference: int, dimensions: int, k: int = K) -> list[str]:
    """What is to be feared of metrics of so few samples; empty if they are enough.

    Args:
        count, reference: images on either side.
        dimensions: of the features.
    """
    fewer, found = min(count, reference), []
    which = f"of {count:,} images and {reference:,} of the reference"
    if "fid" in metrics and fewer <= dimensions:
        found.append(
            f"fid {which}: covariances of {dimensions:,} features need more than {dimensions:,} images. "
            "Of fewer the distance is far too large; compare it with those of as many only."
        )
    if "kid" in metrics and (subset := subset_size(fewer)) < SUBSET:
        found.append(f"kid {which}: subsets have {subset} images instead of {SUBSET:,}. The mean is right, and the interval wide.")
    near = [metric for metric in metrics if metric in ("precision", "recall", "density")]
    if near and fewer < LARGE:
        found.append(
            f"{', '.join(near)} {which}: below {LARGE:,} images neighbours are far away, and much lies in the balls between them."
        )
    if "coverage" in metrics and (best := expected_coverage(count, reference, k)) < COVERED:
        found.append(f"coverage {which}: samples of the reference's own distribution would cover {best:.0%} of it on average.")
    return found
