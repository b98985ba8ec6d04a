"""Mirror planes: most furniture is its own mirror image, and so is what its parts should be put to.

    M(y) = F y + 2 d e_a,     F = I - 2 e_a e_a^T
    asymmetry(g) = sum_p a_p mean_n min(|M(g_p x_pn) - Y|^2, tau^2),     Y the union of g_p X_p, a_p a part's share of the surface

a is the axis across which the model's own samples are most alike. A part that is its own mirror image by Q in the frame of its box
goes from g = (R, t) to its image (F R Q, M(t)), a rigid pose again. So parts are put in pairs of images, or each across the plane:
half as many choices, and none of those that a template tells from the truth only by its noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.assembly.candidates import Anchors
from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.rigid import invert, pose_matrix, transform

SAMPLED = 1024  # points of a template that are mirrored
ALIKE = 0.25  # of tau^2: templates that are less alike their image than this have no plane
ACROSS = 0.06  # r.m.s. distance of a part to its image, in units, at which it lies across the plane
BESIDE = 0.15  # candidates whose middle is nearer to the plane, in units, are tried on it
POINTS = 48  # of each part that are mirrored


class Mirror:
    """The plane y_axis = offset, for poses (..., 4, 4) and points (..., 3)."""

    def __init__(self, axis: int, offset: float) -> None:
        self.axis, self.offset = axis, offset

    @classmethod
    def of(cls, template: Surface, axis: int) -> Mirror:
        """The plane across an axis through the centroid of a template."""
        return cls(axis, float(template.points[:, axis].mean()))

    def points(self, y: Tensor) -> Tensor:
        """The images of points (..., 3)."""
        y = y.clone()
        y[..., self.axis] = 2 * self.offset - y[..., self.axis]
        return y

    def directions(self, n: Tensor) -> Tensor:
        """The images of directions (..., 3)."""
        n = n.clone()
        n[..., self.axis] *= -1
        return n

    def poses(self, poses: Tensor, own: int) -> Tensor:
        """The images of poses (..., 4, 4) of a part that is its own mirror image along axis `own` of its frame."""
        rotation = poses[..., :3, :3].clone()
        rotation[..., self.axis, :] *= -1
        rotation[..., own] *= -1
        return pose_matrix(rotation, self.points(poses[..., :3, 3]))

    def across(self, poses: Tensor) -> Tensor:
        """The poses moved along the axis, to the plane."""
        poses = poses.clone()
        poses[..., self.axis, 3] = self.offset
        return poses


def mirror_axis(templates: Sequence[Surface], tau: float = 0.1) -> int | None:
    """The axis across which templates are most alike their images, if they are."""
    apart = torch.zeros(3)
    for template in templates:
        grid = NearestGrid(template, tau)
        y, normals = template.points[:SAMPLED], template.normals[:SAMPLED]
        for axis in range(3):
            mirror = Mirror.of(template, axis)
            apart[axis] += grid.squared(mirror.points(y), mirror.directions(normals)).mean() / len(templates)
    best = int(apart.argmin())
    return best if apart[best] < ALIKE * tau**2 else None


def split(poses: Tensor, anchors: Anchors, mirror: Mirror, own: int) -> tuple[Tensor, Tensor]:
    """Of candidates (K, 4, 4) of a part: those that lie across the plane, and those that have an image elsewhere, on one side."""
    laid = mirror.across(poses)
    near = (poses[..., mirror.axis, 3] - mirror.offset).abs() < BESIDE
    singles = laid[near & (_to_image(laid, anchors, mirror, own) < ACROSS)]
    apart = poses[_to_image(poses, anchors, mirror, own) > ACROSS]
    other = apart[..., mirror.axis, 3] < mirror.offset
    return singles, torch.where(other[:, None, None], mirror.poses(apart, own), apart)


def _to_image(poses: Tensor, anchors: Anchors, mirror: Mirror, own: int) -> Tensor:
    """R.m.s. distance (K,) of a part in poses (K, 4, 4) to its image, whatever its symmetry."""
    y = transform(anchors.points, poses)[:, None]
    images = transform(anchors.images, mirror.poses(poses, own)[:, None])
    return (y - images).square().sum(-1).mean(-1).amin(-1).sqrt()


def asymmetry(poses: Tensor, x: Tensor, normals: Tensor, shares: Tensor, grids: Sequence[NearestGrid], mirror: Mirror) -> Tensor:
    """How far assemblies (H, P, 4, 4) are from their mirror images (H,).

    Args:
        x, normals: samples of the parts (P, N, 3), in their frames.
        shares: of the surface (P,).
        grids: of each part.
    """
    x, normals = x[:, :POINTS], normals[:, :POINTS]
    turned = poses[..., :3, :3].mT
    y, n = mirror.points(transform(x, poses)).flatten(1, 2), mirror.directions(normals @ turned).flatten(1, 2)
    local, n = transform(y[:, None], invert(poses)), n[:, None] @ turned.mT
    apart = torch.stack([grid.squared(local[:, p], n[:, p]) for p, grid in enumerate(grids)]).amin(0)
    return (apart.unflatten(1, (len(x), -1)).mean(-1) * shares).sum(-1)
