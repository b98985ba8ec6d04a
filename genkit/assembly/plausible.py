"""What no assembly of solid parts does: parts lie in each other, or hang in the air.

    gap(g)      = sum over the edges of the minimum spanning tree of max(0, d_ij - 0.03),   d_ij the least distance of parts i and j
    overlap(g)  = share of the parts' surface that lies inside of another part, deeper than 0.012

in units. Neither knows of a template: they tell apart assemblies that a blurred one, of samples of a model, cannot.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial import KDTree
from torch import Tensor

from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import transform

APART = 0.03  # samples of parts that touch may be so far apart
DEEP = 0.012  # of surface that counts as inside
SAMPLES = 512  # of each part that are asked whether they lie inside
_FACING = 0.6  # of the way to the nearest sample that must go along its normal, or the sample lies beside the surface


@dataclasses.dataclass(frozen=True)
class _Edge:
    """Of the minimum spanning tree of parts: which two, how near their samples come, and from where on i to where on j."""

    i: int
    j: int
    distance: float
    step: np.ndarray


def _spanning_tree(points: Tensor) -> list[_Edge]:
    """Of the samples (P, N, 3) of parts in place, the shortest edge first."""
    trees = [KDTree(y.numpy()) for y in points]
    edges = np.zeros((len(trees), len(trees)))
    found = {}
    for i, j in itertools.combinations(range(len(trees)), 2):
        distance, k = trees[i].query(trees[j].data)
        m = int(distance.argmin())
        found[i, j] = _Edge(i, j, float(distance[m]), trees[j].data[m] - trees[i].data[k[m]])
        edges[i, j] = max(found[i, j].distance, 1e-6)  # zero would be no edge
    kept = minimum_spanning_tree(edges).tocoo()
    chosen = [found[min(i, j), max(i, j)] for i, j in zip(kept.row.tolist(), kept.col.tolist(), strict=True)]
    return sorted(chosen, key=lambda edge: edge.distance)


def spanning_distances(parts: PartSet, pose: Tensor) -> np.ndarray:
    """Least distances between the samples of parts in poses (P, 4, 4), along the minimum spanning tree (P - 1,), in units."""
    return np.array([edge.distance for edge in _spanning_tree(transform(parts.points.double(), pose.double()))])


def gap(parts: PartSet, pose: Tensor) -> float:
    """By how much the parts in poses (P, 4, 4) fail to hold together, in units."""
    return float((spanning_distances(parts, pose) - APART).clip(min=0).sum())


def pulled(parts: PartSet, pose: Tensor, reach: float = 0.15) -> Tensor:
    """Poses (P, 4, 4) with parts that nearly touch brought into contact: what hangs apart by less than `reach` moves as a whole.

    Of two groups of parts the one of less surface moves, the nearest ones first.
    """
    pose = pose.double().clone()
    for _ in range(len(parts)):
        tree = _spanning_tree(transform(parts.points.double(), pose))
        apart = next((edge for edge in tree if APART < edge.distance < reach), None)
        if apart is None:
            break
        touching = np.zeros((len(parts), len(parts)))
        for edge in tree:
            touching[edge.i, edge.j] = edge.distance <= APART
        group = connected_components(touching, directed=False)[1]
        one, other = (torch.from_numpy(group == group[k]) for k in (apart.i, apart.j))
        if parts.areas[one].sum() < parts.areas[other].sum():
            pose[one, :3, 3] += torch.from_numpy(apart.step)
        else:
            pose[other, :3, 3] -= torch.from_numpy(apart.step)
    return pose


def overlap(parts: PartSet, surfaces: Sequence[Surface], pose: Tensor) -> float:
    """Share of the surface of parts in poses (P, 4, 4) inside of other parts. Only closed meshes have an inside.

    Args:
        surfaces: samples of each part in its frame, with normals that point outwards.
    """
    if parts.meshes is None:
        return 0.0
    points = [transform(s.points.double(), g).numpy() for s, g in zip(surfaces, pose.double(), strict=True)]
    normals = [(s.normals.double() @ g[:3, :3].T).numpy() for s, g in zip(surfaces, pose.double(), strict=True)]
    inside = [np.zeros(min(len(y), SAMPLES), dtype=bool) for y in points]
    for j, mesh in enumerate(parts.meshes):
        if not mesh.is_watertight:
            continue
        tree = KDTree(points[j])
        for i, y in enumerate(points):
            if i != j:
                distance, k = tree.query(y[:SAMPLES])
                deep = ((points[j][k] - y[:SAMPLES]) * normals[j][k]).sum(-1)
                inside[i] |= (deep > DEEP) & (deep > _FACING * distance)
    shares = (parts.areas / parts.areas.sum()).tolist()
    return float(sum(share * hidden.mean() for share, hidden in zip(shares, inside, strict=True)))
