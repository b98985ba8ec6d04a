"""Random poses to start from: uniform rotations, centres around the template's, as far out as it is large."""

from __future__ import annotations

import torch
from torch import Tensor

from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import REPOSE, PartSet, content_seed
from genkit.assembly.rigid import pose_matrix, random_rotations


def scattered(parts: PartSet, template: Surface, seed: int) -> Tensor:
    """Poses (P, 4, 4), float64, in units; that of a part is a function of the seed and of the part, whatever their order is."""
    centre = template.points.double().mean(0)
    spread = (template.points.double() - centre).square().mean().sqrt()
    poses: list[Tensor] = []
    met: dict[int, int] = {}
    for points in parts.points:
        key = content_seed(points.numpy(), seed, REPOSE)
        met[key] = met.get(key, 0) + 1  # parts that are the same to the last bit must not start at the same place
        generator = torch.Generator().manual_seed(key + met[key] - 1)
        rotation = random_rotations(1, generator)[0]
        poses.append(pose_matrix(rotation, centre + spread * torch.randn(3, generator=generator, dtype=torch.float64)))
    return torch.stack(poses)
