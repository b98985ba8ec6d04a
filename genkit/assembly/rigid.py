"""Rigid motions of point clouds: the best one between matched points, quaternions, random rotations.

Points are rows; a pose is a 4 x 4 matrix of column vectors, so y = R x + t is `x @ R.T + t` here. The best similarity between
matched points (Kabsch 1976; with a scale, Umeyama 1991): with weights w, means x_bar, d_bar and centred x', d',

    H = sum_n w_n x'_n d'_n^T = U S V^T,   E = diag(1, 1, det(V U^T))
    R = V E U^T,   c = tr(S E) / sum_n w_n |x'_n|^2,   t = d_bar - c R x_bar

One scale that P parts share sums numerator and denominator of c over the parts. E keeps det R = +1 also where the points are
mirrored, flat or on a line.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kabsch(src: Tensor, dst: Tensor, weights: Tensor | None = None, shared_scale: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The rotation R, translation t and scale c that minimise sum w |c R src + t - dst|^2.

    Args:
        src, dst: matched points (..., N, 3).
        weights: (..., N), not negative; all equal by default.
        shared_scale: find a scale too, one for all sets along the axis before N (the parts of an assembly); else it is 1.

    Returns:
        R (..., 3, 3) with det R = 1, t (..., 3), and c, () without a shared scale, else (...) without the axis of the parts.
        Computed in float64, returned in the dtype of `src`.

    Raises:
        ValueError: shapes that do not fit, or a shared scale without an axis of parts.

    Example:
        >>> R, t, c = kabsch(x, x @ R0.T + t0)      # R0 and t0, c = 1
    """
    if src.shape != dst.shape or src.ndim < 2 or src.shape[-1] != 3:
        raise ValueError(f"Matched points must have one shape (..., N, 3); got {tuple(src.shape)} and {tuple(dst.shape)}.")
    if weights is not None and weights.shape != src.shape[:-1]:
        raise ValueError(f"Weights {tuple(weights.shape)} do not fit points {tuple(src.shape)}. Give {tuple(src.shape[:-1])}.")
    if shared_scale and src.ndim < 3:
        raise ValueError(f"A shared scale needs points (..., parts, N, 3); got {tuple(src.shape)}.")
    x, d = src.double(), dst.double()
    w = torch.ones_like(x[..., 0]) if weights is None else weights.double()
    w = w / w.sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    x_bar, d_bar = (torch.einsum("...n,...nk->...k", w, points) for points in (x, d))
    x, d = x - x_bar[..., None, :], d - d_bar[..., None, :]
    u, s, vt = torch.linalg.svd(torch.einsum("...n,...ni,...nj->...ij", w, x, d))
    sign = torch.where(torch.linalg.det(u) * torch.linalg.det(vt) < 0, -1.0, 1.0).to(s)
    e = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], -1)
    rotation = torch.einsum("...ki,...k,...jk->...ij", vt, e, u)
    scale = torch.ones((), dtype=x.dtype, device=x.device)
    if shared_scale:
        spread = torch.einsum("...n,...nk->...", w, x * x).sum(-1)
        scale = (s * e).sum((-1, -2)) / spread.clamp_min(torch.finfo(x.dtype).tiny)
    moved = torch.einsum("...ij,...j->...i", rotation, x_bar)
    translation = d_bar - (scale[..., None, None] if shared_scale else scale) * moved
    return rotation.to(src), translation.to(src), scale.to(src)


def pose_matrix(rotation: Tensor, translation: Tensor) -> Tensor:
    """Poses (..., 4, 4) of rotations (..., 3, 3), or any linear maps, and translations (..., 3)."""
    pose = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
    pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = rotation, translation, 1
    return pose


def transform(points: Tensor, poses: Tensor) -> Tensor:
    """Points (..., N, 3) moved by poses (..., 4, 4); leading axes broadcast."""
    return points @ poses[..., :3, :3].mT + poses[..., None, :3, 3]


def invert(poses: Tensor) -> Tensor:
    """The inverse of rigid poses (..., 4, 4)."""
    back = poses[..., :3, :3].mT
    return pose_matrix(back, -(back @ poses[..., :3, 3:])[..., 0])


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle (...) in radians between rotations (..., 3, 3): that of the rotation a b^T. Exact for small ones too."""
    # |a - b|_F = 2 sqrt(2) |sin(angle / 2)|, which does not lose small angles as the trace does.
    half = (a - b).flatten(-2).norm(dim=-1) / 8**0.5
    return 2 * torch.asin(half.clamp(max=1.0))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions (..., 4) = (w, x, y, z), of any length but zero; q and -q are the same rotation."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Unit quaternions (..., 4) = (w, x, y, z), w not negative, of rotations (..., 3, 3). scipy has the scalar last, we first."""
    from scipy.spatial.transform import Rotation

    xyzw = torch.from_numpy(Rotation.from_matrix(rotation.detach().double().cpu().reshape(-1, 3, 3).numpy()).as_quat())
    wxyz = xyzw.roll(1, -1) * torch.where(xyzw[:, 3:] < 0, -1.0, 1.0)
    return wxyz.reshape(*rotation.shape[:-2], 4).to(rotation)


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Rotations (count, 3, 3), float64, uniform on SO(3) (a normal vector of four numbers is a uniform quaternion)."""
    return quaternion_to_matrix(torch.randn(count, 4, dtype=torch.float64, generator=generator))
