"""How right an assembly is, by the measures of the PartNet assembly benchmark, in three conventions.

    PA  = share of the parts with CD(g_i X_i, g*_m(i) X_m(i)) < 0.01        m matches parts that may stand for each other
    SCD = CD(union of g_i X_i, union of g*_i X_i)
    CA  = share of the ordered pairs (i, j) that touch, with min |g_i c_ij - g_j c_ji|^2 < 0.01 over mirror images of both points

Lengths are in units of the longest side of a part. CD sums the mean *squared* distances of both directions, so 0.01 is a distance
of 0.07 for a part that is displaced.

`strict` (the default) matches every class of geometry, counts parts that are there, lets a contact point stand for its images under
the part's own symmetries alone, and takes one assembly. `dgl` (Huang et al. 2020, arXiv 2006.07793) never matches the class with
id 0, divides SCD by 20 parts whatever there is (padding lies away from the shape, at one place in both), mirrors 5 of 8 ways
whatever the part, and takes the best of k assemblies, measure by measure. `mpa` (multi_part_assembly) takes one assembly, the
parts that are there and all 8 mirrors.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.assembly.distances import chamfer, nearest
from genkit.assembly.equivalence import match_parts
from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import transform
from genkit.assembly.symmetry import Symmetry, best_turn, mirror_axes
from genkit.errors import unknown

PROTOCOLS = ("strict", "dgl", "mpa")
CORRECT = 0.01  # Chamfer distance of a right part, squared distance of a right contact
TOUCHING = 1e-3  # squared distance of parts that touch
DGL_PARTS = 20  # that a shape is padded to
# The reference flips signs in place, so that it meets these of the eight only.
DGL_MIRRORS = ((1, 1, 1), (1, 1, -1), (1, -1, -1), (-1, 1, 1), (-1, -1, -1))
MIN_POINTS = 100  # of half a part, to see its symmetry
MIRRORS = tuple(itertools.product((1, -1), repeat=3))


def evaluate(poses: Tensor, parts: PartSet, protocol: str = "strict") -> dict[str, float]:
    """The measures of one object.

    Args:
        poses: (P, 4, 4) of the parts in units, or (K, P, 4, 4), best first; `dgl` takes the best of K, the others the first.
        parts: with the true poses. Contacts are those given, or found in the true assembly.

    Returns:
        `part_accuracy`, `connectivity_accuracy` (NaN if nothing touches), `shape_chamfer`, the counts `correct_parts` and `parts`
        that a micro average needs, and of (K, P, 4, 4), even of one, `best_part_accuracy`.

    Raises:
        ValueError: an unknown protocol, parts without truth, or poses of another shape.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if parts.poses is None:
        raise ValueError(
            "The true poses of these parts are not known, so nothing can be measured. Give parts in their assembled pose."
        )
    tried = poses if poses.ndim == 4 else poses[None]
    if tuple(tried.shape[1:]) != (len(parts), 4, 4):
        raise ValueError(f"Poses are {tuple(poses.shape)}. Give ({len(parts)}, 4, 4), or several of them.")
    contacts = find_contacts(parts) if parts.contacts is None else parts.contacts
    rows = [_measure(pose.double(), parts, contacts.double(), protocol) for pose in tried]
    if protocol == "dgl":
        best = {key: max(row[key] for row in rows) for key in ("part_accuracy", "connectivity_accuracy", "correct_parts")}
        return {**rows[0], **best, "shape_chamfer": min(row["shape_chamfer"] for row in rows)}
    if poses.ndim == 4:  # of one, too, or an average over objects would leave out those with a single assembly
        rows[0]["best_part_accuracy"] = max(row["part_accuracy"] for row in rows)
    return rows[0]


def part_distances(poses: Tensor, parts: PartSet) -> dict[str, float]:
    """Chamfer distances of the parts of an assembly (P, 4, 4) that are wrong by the strict protocol, by name."""
    assert parts.poses is not None
    local = parts.points.double()
    predicted, true = transform(local, poses.double()), transform(local, parts.poses.double())
    match = match_parts(predicted, true, parts.geometry_ids)
    distances = [chamfer(predicted[i], true[m]).item() for i, m in enumerate(match)]
    return {name: round(d, 4) for name, d in zip(parts.names, distances, strict=True) if d >= CORRECT}


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Averages over objects: macro (each object counts once) of every measure, and `part_accuracy_micro` (each part once).

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("There is no object to average over.")
    means = {}
    for key in ("part_accuracy", "best_part_accuracy", "connectivity_accuracy", "shape_chamfer"):
        values = [row[key] for row in rows if key in row and row[key] == row[key]]
        if values:
            means[key] = sum(values) / len(values)
    micro = sum(row["correct_parts"] for row in rows) / sum(row["parts"] for row in rows)
    return {**means, "part_accuracy_micro": micro, "objects": len(rows)}


def find_contacts(parts: PartSet) -> Tensor:
    """Contacts (P, P, 4) of the true assembly: whether i and j come closer than sqrt(1e-3), and where on i, in i's frame.

    Raises:
        ValueError: the true poses are not known.
    """
    if parts.poses is None:
        raise ValueError("Contacts are found in the true assembly, which is not known of these parts.")
    local = parts.points.double()
    placed = transform(local, parts.poses.double())
    contacts = torch.zeros(len(parts), len(parts), 4, dtype=torch.float64)
    for i, j in itertools.permutations(range(len(parts)), 2):
        distance, _ = nearest(placed[i], placed[j])
        k = int(distance.argmin())
        if distance[k].square() < TOUCHING:
            contacts[i, j, 0], contacts[i, j, 1:] = 1, local[i, k]
    return contacts


def _measure(poses: Tensor, parts: PartSet, contacts: Tensor, protocol: str) -> dict[str, float]:
    assert parts.poses is not None
    local = parts.points.double()
    predicted, true = transform(local, poses), transform(local, parts.poses.double())
    match = match_parts(predicted, true, parts.geometry_ids, skip=(0,) if protocol == "dgl" else ())
    right = [chamfer(predicted[i], true[m]).item() < CORRECT for i, m in enumerate(match)]
    a, b = predicted.flatten(0, 1), true.flatten(0, 1)
    distance = chamfer(a, b).item()
    if protocol == "dgl":
        distance *= len(parts) / DGL_PARTS
    return {
        "part_accuracy": sum(right) / len(right),
        "connectivity_accuracy": _connectivity(poses, parts, contacts, match, protocol),
        "shape_chamfer": distance,
        "correct_parts": float(sum(right)),
        "parts": float(len(right)),
    }


def _connectivity(poses: Tensor, parts: PartSet, contacts: Tensor, match: list[int], protocol: str) -> float:
    """Share of touching ordered pairs whose contact points meet; under `strict` matched parts stand for each other here too."""
    touching = contacts[..., 0] > 0.5
    if not touching.any():
        return float("nan")
    if protocol == "strict":
        poses = _poses_of_true(poses, parts, match)
    images = [_images(parts, p, protocol) for p in range(len(parts))]
    met = []
    for i, j in touching.nonzero().tolist():
        ends = [(images[p] @ contacts[p, q, 1:]) @ poses[p, :3, :3].T + poses[p, :3, 3] for p, q in ((i, j), (j, i))]
        # Where only one direction is labelled, as the pair's second label is missing, the pair cannot be judged and counts as
        # apart.
        both = bool(touching[j, i])
        met.append(both and bool((ends[0][:, None] - ends[1][None]).square().sum(-1).min() < CORRECT))
    return sum(met) / len(met)


def _poses_of_true(poses: Tensor, parts: PartSet, match: list[int]) -> Tensor:
    """For each true part, the pose of the part that stands for it, from the true part's frame."""
    placed = poses.clone()
    for i, m in enumerate(match):
        placed[m] = poses[i]
        if i != m:
            turn, _ = best_turn(parts.points[m].double(), parts.points[i].double(), tolerance=0.1)
            placed[m, :3, :3] = poses[i, :3, :3] @ turn
    return placed


def _images(parts: PartSet, p: int, protocol: str) -> Tensor:
    """Linear maps (k, 3, 3) to the places on part p that count as one contact point."""
    if protocol != "strict":
        return torch.diag_embed(torch.tensor(DGL_MIRRORS if protocol == "dgl" else MIRRORS, dtype=torch.float64))
    half = parts.points.shape[1] // 2
    a, b = parts.points[p, :half].double(), parts.points[p, half : 2 * half].double()
    known = mirror_axes(a, b) if parts.mirrors is None else parts.mirrors[p]
    flips = itertools.product(*[(1, -1) if symmetric else (1,) for symmetric in known.tolist()])
    mirrors = torch.diag_embed(torch.tensor(list(flips), dtype=torch.float64))
    if half < MIN_POINTS:
        return mirrors
    return (Symmetry.of(a, b).sampled()[:, None] @ mirrors).flatten(0, 1)
