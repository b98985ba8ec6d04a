"""Pushes parts of an assembly apart that lie in each other.

Of two parts i and j, the points of i within tau of j are I. Where there are more than `min_count` of them (and, for ours, where j
has as many),

    u = (mean(Y_i without I) - mean(I)) / |...|,      Y_i += rate * u

The published rule moves i only, of pairs i < j from one snapshot, so that the last part never moves; and has no direction for a
part that lies in another one whole. Ours moves both, half as far each, by the inverse of their numbers of points' extent, and
then takes the direction between the centres, or a fixed one where those coincide. Parts that touch rightly overlap a little: a
pair is left alone until a share `allowed` of either part lies in the other.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from genkit.assembly.distances import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushApartConfig:
    """How parts are pushed apart.

    Args:
        rate: length of a push.
        tau2: squared distance of points that overlap.
        min_count: overlapping points that are too few to act on.
        rounds: of pushes at most; it stops when nothing overlaps.
        allowed: share of a part's points that may overlap, since parts that belong together touch; not in the published rule.
        legacy: the published rule.

    Raises:
        ValueError: a negative value.
    """

    rate: float = 0.01
    tau2: float = 1e-3
    min_count: int = 20
    rounds: int = 10
    allowed: float = 0.5
    legacy: bool = False

    def __post_init__(self) -> None:
        for name in ("rate", "tau2", "min_count", "rounds", "allowed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")


def push_apart(points: Tensor, config: PushApartConfig | None = None) -> tuple[Tensor, int]:
    """Move parts (P, N, 3) apart.

    Returns:
        The moved points (only translated, part by part), and how many pushes there were.

    Example:
        >>> apart, pushes = push_apart(torch.stack([a, b]), PushApartConfig(legacy=True, min_count=0))
    """
    config = config or PushApartConfig()
    y, total = points.clone(), 0
    for _ in range(config.rounds):
        shift, pushes = _legacy(y, config) if config.legacy else _symmetric(y, config)
        if not pushes:
            break
        y, total = y + shift[:, None], total + pushes
    return y, total


def _overlap(a: Tensor, b: Tensor, config: PushApartConfig) -> Tensor:
    """Which points of a (N,) lie within tau of b."""
    return nearest(a, b)[0].square() < config.tau2


def _legacy(y: Tensor, config: PushApartConfig) -> tuple[Tensor, int]:
    shift, pushes = torch.zeros_like(y[:, 0]), 0
    for i, j in itertools.combinations(range(len(y)), 2):
        inside = _overlap(y[i], y[j], config)
        if int(inside.sum()) > config.min_count:
            shift[i] += config.rate * _direction(y[i], y[j], inside)
            pushes += 1
    return shift, pushes


def _symmetric(y: Tensor, config: PushApartConfig) -> tuple[Tensor, int]:
    shift, pushes = torch.zeros_like(y[:, 0]), 0
    least = max(config.min_count, config.allowed * y.shape[1])
    extent = (y.amax(1) - y.amin(1)).norm(dim=-1).clamp_min(1e-6)
    for i, j in itertools.combinations(range(len(y)), 2):
        inside, other = _overlap(y[i], y[j], config), _overlap(y[j], y[i], config)
        if max(int(inside.sum()), int(other.sum())) > least:
            way = _direction(y[i], y[j], inside)
            lighter = extent[j] / (extent[i] + extent[j])  # the smaller part moves farther
            shift[i] += config.rate * lighter * way
            shift[j] -= config.rate * (1 - lighter) * way
            pushes += 1
    return shift, pushes


def _direction(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """The way out for a (3,): away from its points inside of b, else from b's centre, else along the first axis."""
    ways = [a.mean(0) - b.mean(0)]
    if inside.any() and not inside.all():
        ways.insert(0, a[~inside].mean(0) - a[inside].mean(0))
    for way in ways:
        if way.norm() > 1e-6:
            return way / way.norm()
    return torch.eye(3, dtype=a.dtype, device=a.device)[0]
