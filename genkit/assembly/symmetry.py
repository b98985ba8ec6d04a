"""Part symmetry: which rotations leave a part as it is, and errors of rotations that do not count those.

    G = {q in the cube's rotations : CD(q X, X) < 2 floor}          error(R', R) = min over q in G of angle(R' q, R)

A part lies in the frame of its box (`genkit.assembly.parts`), so what can leave it unchanged is among the 24 rotations of a cube,
and turning about an axis by any angle (a revolution: round legs, lamp shades). CD is the Chamfer distance between two independent
samples of the surface, so `floor` is what an exact symmetry has: for N points each on an area A, about 2 A / (pi N).
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import Tensor

from genkit.assembly.distances import chamfer
from genkit.assembly.rigid import angle

TURNS = 12  # angles at which a revolution is tried


@functools.cache
def cube_rotations() -> Tensor:
    """The 24 rotations (24, 3, 3), float64, that map the axes to the axes; the identity first."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = signs
            if np.linalg.det(matrix) > 0:
                found.append(matrix)
    found.sort(key=lambda m: (not np.array_equal(m, np.eye(3)), m.tolist()))
    return torch.from_numpy(np.stack(found))


def axis_rotation(axis: int, angles: Tensor) -> Tensor:
    """Rotations (..., 3, 3) about coordinate axis 0, 1 or 2 by angles (...) in radians."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.zeros(*angles.shape, 3, 3, dtype=angles.dtype)
    matrix[..., axis, axis] = 1
    matrix[..., i, i] = matrix[..., j, j] = angles.cos()
    matrix[..., j, i] = angles.sin()
    matrix[..., i, j] = -matrix[..., j, i]
    return matrix


def box_rotations(sizes: Tensor, tolerance: float = 0.1) -> Tensor:
    """Those of the cube's rotations (k, 3, 3) that map a box of sides (3,) to itself, but for a share of its longest side."""
    cube = cube_rotations()
    changed = (cube.abs() @ sizes.double() - sizes.double()).abs().amax(-1)
    return cube[changed <= tolerance * sizes.max().double()]


def best_turn(a: Tensor, b: Tensor, tolerance: float = 0.03) -> tuple[Tensor, float]:
    """The rotation q (3, 3), float64, of the box of `a` (N, 3) for which q a is nearest to `b` (M, 3), and their distance."""
    turns = box_rotations(a.abs().amax(0), tolerance)
    distances = [chamfer(a.double() @ q.T, b.double()).item() for q in turns]
    k = min(range(len(turns)), key=distances.__getitem__)
    return turns[k], distances[k]


def mirror_axes(a: Tensor, b: Tensor, factor: float = 2.0) -> Tensor:
    """Along which axes (3,) a part is its own mirror image, from two independent samples (N, 3) in the frame of its box."""
    limit = factor * chamfer(a, b).item()
    signs = 1 - 2 * torch.eye(3, dtype=a.dtype)
    return torch.tensor([chamfer(a * flip, b).item() <= limit for flip in signs])


class Symmetry:
    """The symmetries of one part in its own frame.

    Args:
        rotations: the group G (g, 3, 3), float64, with the identity.
        revolution: the axis, 0, 1 or 2, about which any turn leaves the part as it is; None if there is none. A ball has one, the
            first.
    """

    def __init__(self, rotations: Tensor, revolution: int | None = None) -> None:
        self.rotations, self.revolution = rotations, revolution

    @classmethod
    def none(cls) -> Symmetry:
        """That of a part without any."""
        return cls(torch.eye(3, dtype=torch.float64)[None])

    @classmethod
    def of(cls, a: Tensor, b: Tensor, factor: float = 2.0) -> Symmetry:
        """The symmetries of a part, from two independent samples (N, 3) of its surface, centred in the frame of its box.

        Args:
            factor: how many times the Chamfer distance of the samples a symmetry may have.
        """
        limit = factor * chamfer(a, b).item()
        a, b = a.double(), b.double()
        sizes = b.abs().amax(0)
        identity, *others = box_rotations(sizes)
        group = [identity, *(q for q in others if chamfer(b @ q.T, a).item() <= limit)]
        for axis in range(3):
            i, j = (axis + 1) % 3, (axis + 2) % 3
            if (sizes[i] - sizes[j]).abs() < 0.1 * max(sizes[i], sizes[j]):
                turns = axis_rotation(axis, torch.arange(1, TURNS, dtype=torch.float64) * (2 * torch.pi / TURNS) + 0.1)
                if all(chamfer(b @ q.T, a).item() <= limit for q in turns):
                    return cls(torch.stack(group), axis)
        return cls(torch.stack(group))

    def __len__(self) -> int:
        return len(self.rotations)

    def sampled(self, turns: int = 12) -> Tensor:
        """The group (k, 3, 3), float64, a revolution as so many turns."""
        if self.revolution is None:
            return self.rotations
        spun = axis_rotation(self.revolution, torch.arange(turns, dtype=torch.float64) * (2 * torch.pi / turns))
        return (self.rotations[:, None] @ spun).flatten(0, 1)

    def error(self, predicted: Tensor, true: Tensor) -> Tensor:
        """Angle (...) in radians between rotations (..., 3, 3), the least over the symmetries."""
        if self.revolution is None:
            turned = predicted[..., None, :, :].double() @ self.rotations
            return angle(turned, true[..., None, :, :].double()).amin(-1)
        # Any turn about the axis: what is left is the angle between the axes, as the group maps them.
        axes = self.rotations[:, :, self.revolution]
        a = torch.einsum("...ij,gj->...gi", predicted.double(), axes)
        b = true.double()[..., None, :, self.revolution]
        return (2 * torch.asin(((a - b).norm(dim=-1) / 2).clamp(max=1.0))).amin(-1)

    def distinct(self, rotations: Tensor, tolerance: float = 1e-3) -> Tensor:
        """Those of rotations (K, 3, 3) that put the part differently; the first of each kind, in order."""
        kept: list[Tensor] = []
        for rotation in rotations:
            if not kept or self.error(torch.stack(kept), rotation).min() > tolerance:
                kept.append(rotation)
        return torch.stack(kept)
