"""Candidate poses of a part on a template, from everywhere: all rotations of a grid, all translations, the best ones polished.

    score(R, t) = sum_i f(R x_i + t),    f(y) = 1 - min(|y - S|^2, tau^2) / tau^2

is, for one rotation, a correlation of the part's occupancy with the field f of the template S, so one pair of Fourier transforms
gives it at all translations. Local maxima are polished by a few steps of ICP (Besl and McKay 1992) on look-ups, and of candidates
that put the part at the same place (whatever its symmetry) one is kept.

Rotations are the 24 of a cube, relative to the axes of the template and of its box, and an even grid on SO(3) (super-Fibonacci
spirals: Alexa 2022), both without those that the part's symmetry makes equal.
"""

from __future__ import annotations

import dataclasses
import math

import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.assembly.nearest_grid import NearestGrid, Surface
from genkit.assembly.rigid import kabsch, pose_matrix, quaternion_to_matrix, transform
from genkit.assembly.symmetry import Symmetry, cube_rotations

SCORE_POINTS, ICP_POINTS, COARSE_POINTS = 256, 128, 64
PER_ROTATION = 16  # placements of each rotation that go on, at least
BATCH = 16  # rotations transformed at once
_APART = 0.25  # between axes of revolution that are tried, in radians


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Poses of one part (K, 4, 4), float32, and `residual` (K,): mean squared distance of the part to the template, best first."""

    poses: Tensor
    residual: Tensor


def spiral_rotations(count: int) -> Tensor:
    """An even grid of rotations (count, 3, 3), float64, on SO(3)."""
    s = torch.arange(count, dtype=torch.float64) + 0.5
    r, big, d = (s / count).sqrt(), (1 - s / count).sqrt(), 2 * math.pi * s
    alpha, beta = d / math.sqrt(2), d / 1.533751168755204288118041
    return quaternion_to_matrix(torch.stack([r * alpha.sin(), r * alpha.cos(), big * beta.sin(), big * beta.cos()], -1))


def rotation_set(symmetry: Symmetry, bases: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rotations to try for a part: those of the cube relative to bases (b, 3, 3), and of `count` on the grid; without repeats."""
    cube = symmetry.distinct((bases[:, None] @ cube_rotations()).reshape(-1, 3, 3), tolerance=0.05)
    grid = spiral_rotations(count)
    # A fundamental domain of the group: of the rotations R q, the one nearest to the identity.
    traces = (grid[:, None] @ symmetry.rotations).diagonal(dim1=-2, dim2=-1).sum(-1)
    grid = grid[traces[:, 0] >= traces.amax(1) - 1e-9]
    return cube, grid if symmetry.revolution is None else symmetry.distinct(grid, _APART)


def correlate(x: Tensor, rotations: Tensor, template: NearestGrid, voxel: float, count: int) -> tuple[Tensor, Tensor]:
    """Placements (K, 4, 4) of a part x (n, 3) at local maxima of the score, and their scores (K,); about `count` in all.

    The volume is as large as template and part together; what would wrap around it scores low after polishing.
    """
    low = template.low + template.tau - voxel
    inner = (template.size * template.voxel - 2 * template.tau + 2 * voxel) / voxel
    counts = [int(n) + 1 for n in inner]
    axes = torch.meshgrid(*(torch.arange(n, device=x.device) for n in counts), indexing="ij")
    field = 1 - template.squared((torch.stack(axes, -1) + 0.5) * voxel + low) / template.tau**2
    reach = math.ceil(float(x.norm(dim=-1).max()) / voxel)
    shape = [scipy.fft.next_fast_len(n + reach, real=True) for n in counts]
    spectrum = torch.fft.rfftn(field, s=shape)
    size = torch.tensor(shape, device=x.device)
    poses, scores, each = [], [], max(PER_ROTATION, -(-count // len(rotations)))
    for r in rotations.to(x).split(BATCH):
        cell = ((x @ r.mT) / voxel).round().long() % size
        flat = ((torch.arange(len(r), device=x.device)[:, None] * shape[0] + cell[..., 0]) * shape[1] + cell[..., 1]) * shape[2]
        occupancy = torch.bincount((flat + cell[..., 2]).flatten(), minlength=len(r) * math.prod(shape)).reshape(-1, *shape)
        score = _correlation(occupancy.float() / len(x), spectrum, shape)[:, : counts[0], : counts[1], : counts[2]]
        peaks = torch.where(score >= F.max_pool3d(score[:, None], 3, 1, 1)[:, 0], score, 0.0).flatten(1)
        best = peaks.topk(min(each, peaks.shape[1]), 1)
        i = best.indices
        place = torch.stack([i // (counts[1] * counts[2]), i // counts[2] % counts[1], i % counts[2]], -1)
        translation = (place + 0.5) * voxel + low
        poses.append(pose_matrix(r[:, None].expand(-1, i.shape[1], 3, 3), translation).flatten(0, 1))
        scores.append(best.values.flatten())
    return torch.cat(poses), torch.cat(scores)


def _correlation(occupancy: Tensor, spectrum: Tensor, shape: list[int]) -> Tensor:
    if occupancy.device.type != "cpu":
        return torch.fft.irfftn(spectrum * torch.fft.rfftn(occupancy, dim=(1, 2, 3)).conj(), s=shape, dim=(1, 2, 3))
    # scipy's transforms are twice as fast as torch's at these sizes.
    product = spectrum.numpy() * scipy.fft.rfftn(occupancy.numpy(), axes=(1, 2, 3)).conj()
    return torch.from_numpy(scipy.fft.irfftn(product, shape, axes=(1, 2, 3)))


def icp(x: Tensor, normals: Tensor, poses: Tensor, template: NearestGrid, steps: int) -> Tensor:
    """Poses (K, 4, 4) of a part x (n, 3) after some steps of ICP; points that the template is not near do not count."""
    for _ in range(steps):
        y = transform(x, poses)
        target = template.nearest(y, normals @ poses[:, :3, :3].mT)
        near = (y - target).square().sum(-1) < template.tau**2
        target = torch.where(near[..., None], target, y)
        rotation, translation, _ = kabsch(x.expand_as(y), target, near.float() + 1e-4)
        poses = pose_matrix(rotation, translation)
    return poses


class Anchors:
    """A few far-apart points of a part, under each of its symmetries: tells poses apart that put the part differently.

    Args:
        x: the part (n, 3).
        symmetry: its symmetries.
    """

    def __init__(self, x: Tensor, symmetry: Symmetry, count: int = 12) -> None:
        chosen = [int(x.norm(dim=-1).argmax())]
        distance = (x - x[chosen[0]]).norm(dim=-1)
        for _ in range(count - 1):
            chosen.append(int(distance.argmax()))
            distance = distance.minimum((x - x[chosen[-1]]).norm(dim=-1))
        self.points = x[chosen]
        self.images = torch.einsum("gij,nj->gni", symmetry.sampled(6).to(x), self.points)

    def apart(self, poses: Tensor, scores: Tensor, keep: int, radius: float) -> Tensor:
        """Rows of the poses (K, 4, 4) to keep, by ascending score (K,): at most `keep`, each `radius` (r.m.s.) from the others."""
        order = scores.argsort(stable=True)
        poses = poses[order]
        y = transform(self.points, poses).flatten(1)
        images = transform(self.images, poses[:, None]).flatten(2)
        squares = y.square().sum(1)
        alive = torch.ones(len(poses), dtype=torch.bool, device=poses.device)
        kept: list[int] = []
        for k in range(len(poses)):
            if alive[k]:
                kept.append(k)
                if len(kept) == keep:
                    break
                z = images[k]
                distance = (squares[:, None] + z.square().sum(1) - 2 * y @ z.mT).amin(1) / len(self.points)
                alive &= distance > radius**2
        return order[torch.tensor(kept, device=order.device)]


def residual(part: Surface, poses: Tensor, template: NearestGrid, count: int = SCORE_POINTS) -> Tensor:
    """Mean squared distance (K,) of a part in poses (K, 4, 4) to the template, cut off, over its first samples."""
    y = transform(part.points[:count], poses)
    return template.squared(y, part.normals[:count] @ poses[..., :3, :3].mT).mean(-1)


def propose(
    part: Surface,
    symmetry: Symmetry,
    template: NearestGrid,
    *,
    bases: Tensor,
    rotations: int,
    count: int,
    voxel: float,
    radius: float,
) -> Candidates:
    """The candidates of a part: `count` with rotations of the cube, which most parts of most objects have, and as many with others.

    Args:
        part: samples of its surface, in its frame, in random order.
        bases: frames of the template (b, 3, 3).
        rotations: size of the grid on SO(3).
        voxel: of the volume of translations.
        radius: between two candidates.
    """
    x, normals = part.points, part.normals
    anchors = Anchors(x, symmetry)
    found = []
    for turned, step in zip(rotation_set(symmetry, bases, rotations), (voxel, 1.5 * voxel), strict=True):
        if len(turned) == 0:
            continue
        poses, scores = correlate(x[:SCORE_POINTS], turned, template, step, 6 * count)
        poses = poses[scores.argsort(descending=True, stable=True)[: 6 * count]]
        for points, steps, keep in ((COARSE_POINTS, 4, 2 * count), (ICP_POINTS, 8, count)):
            poses = icp(x[:points], normals[:points], poses, template, steps)
            poses = poses[anchors.apart(poses, residual(part, poses, template, 2 * points), keep, radius)]
        found.append(poses)
    poses = torch.cat(found)
    return Candidates(poses, residual(part, poses, template))
