"""Dense samples with normals of the parts and of a template, and which parts are of one shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import SURFACE, PartSet, content_seed
from genkit.assembly.rigid import invert, transform
from genkit.assembly.symmetry import Symmetry, best_turn

PART_SAMPLES = 4096
TEMPLATE_SAMPLES = 16384
_SAME_BOX = 0.02  # by how much of the longest side the boxes of parts of one shape may differ


@dataclasses.dataclass(frozen=True, eq=False)
class Shape:
    """What parts that are alike have in common, in the frame of the first of them.

    Args:
        surface: samples.
        area: of the whole surface.
        symmetry: its symmetries.
        members: numbers of the parts.
        turns: for each member the rotation (3, 3), float64, from the member's frame to the shape's.
    """

    surface: Surface
    area: float
    symmetry: Symmetry
    members: list[int]
    turns: list[Tensor]


def part_surface(parts: PartSet, i: int, count: int = PART_SAMPLES) -> Surface:
    """Samples of part i in its frame: of its mesh, with its normals, or else its points."""
    if parts.meshes is None:
        return Surface(parts.points[i])
    points, normals = sample_mesh(parts.meshes[i], count, seed=1)
    frame = parts.frames[i].double()
    local = transform(points / parts.unit, invert(frame))
    return Surface(local.float(), (normals @ frame[:3, :3]).float())


def sample_mesh(mesh: Any, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Area-uniform samples (count, 3) of a trimesh surface and their normals, float64; the seed is mixed with the vertices."""
    from trimesh.sample import sample_surface

    points, faces = sample_surface(mesh, count, seed=content_seed(mesh.vertices, seed, SURFACE))
    return torch.from_numpy(np.array(points)), torch.from_numpy(np.array(mesh.face_normals[faces]))


def template_surface(template: Any, unit: float = 1.0, scale: float = 1.0) -> Surface:
    """Samples of a template: a mesh, a `Surface`, or a cloud (K, 3) whose normals are estimated.

    Args:
        unit, scale: the template's lengths are divided by `unit * scale`.

    Raises:
        ValueError: a cloud of another shape, of fewer than 64 points, of one place, or with NaN; a mesh without surface.
    """
    if isinstance(template, Surface):
        return template
    if hasattr(template, "faces"):
        if len(template.faces) == 0 or not np.isfinite(template.area) or template.area <= 0:
            raise ValueError("The reference has no surface. Give a mesh with faces, or a cloud of points.")
        points, normals = sample_mesh(template, TEMPLATE_SAMPLES, seed=2)
        return Surface((points / (unit * scale)).float(), normals.float())
    cloud = torch.as_tensor(template).detach().double().cpu()
    if cloud.ndim != 2 or cloud.shape[1] != 3 or len(cloud) < 64:
        raise ValueError(f"A reference cloud must be (K, 3) with at least 64 points; got {tuple(cloud.shape)}.")
    if not torch.isfinite(cloud).all():
        raise ValueError("The reference has NaN or infinite coordinates. Repair it.")
    if float((cloud.amax(0) - cloud.amin(0)).max()) <= 0:
        raise ValueError(f"All {len(cloud)} points of the reference are at one place. Give a scan of the whole object.")
    if len(cloud) > TEMPLATE_SAMPLES:
        generator = torch.Generator().manual_seed(content_seed(cloud.numpy(), 2, SURFACE))
        cloud = cloud[torch.randperm(len(cloud), generator=generator)[:TEMPLATE_SAMPLES]]
    return Surface((cloud / (unit * scale)).float())


def shapes_of(parts: PartSet, surfaces: list[Surface]) -> list[Shape]:
    """The distinct shapes of parts, in order of their first members."""
    shapes: list[Shape] = []
    floors: list[float] = []
    half = parts.points.shape[1] // 2
    for i in range(len(parts)):
        points = parts.points[i]
        for shape, floor in zip(shapes, floors, strict=True):
            first = shape.members[0]
            if (parts.extents[i] - parts.extents[first]).abs().max() > _SAME_BOX * parts.extents[first].max():
                continue
            turn, distance = best_turn(points, parts.points[first])
            if distance <= floor:
                shape.members.append(i)
                shape.turns.append(turn)
                break
        else:
            symmetry = Symmetry.of(points[:half], points[half:])
            shapes.append(Shape(surfaces[i], float(parts.areas[i]), symmetry, [i], [torch.eye(3, dtype=torch.float64)]))
            floors.append(_floor(points))
    return shapes


def _floor(points: Tensor) -> float:
    """Twice the Chamfer distance that two samples like these of one surface have."""
    from genkit.assembly.distances import chamfer

    half = len(points) // 2
    # Halves are half as dense as the whole: their distance is about twice that of two whole samples.
    return chamfer(points[:half], points[half : 2 * half]).item()
