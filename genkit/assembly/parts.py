"""PartSet: the parts of one object, each in a frame of its own, whatever pose they came in.

    input = unit * R_f x + t_f        x: the part in its frame, R_f and t_f from `frames`

A part's frame is that of its smallest box, centred, sides in ascending order; lengths are in units of the longest side of all boxes
(the convention of the PartNet assembly benchmark: Huang et al. 2020, arXiv 2006.07793). Before the box is found, each part is
turned at random, so that nothing of the pose that it came in is left in its frame.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genkit.assembly.equivalence import geometry_classes
from genkit.assembly.nearest_grid import Surface
from genkit.assembly.rigid import invert, pose_matrix, random_rotations, transform
from genkit.noise import mix

if TYPE_CHECKING:
    from trimesh import Trimesh

POINTS = 1000  # of each part, as the benchmark has
MOST_PARTS = 64
REPOSE, SURFACE = range(2)  # streams of random numbers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PartSet:
    """The parts of one object.

    Args:
        points: samples of each part's surface (P, N, 3), area-uniform, in its frame and unit.
        extents: sides of each box (P, 3).
        areas: of each surface (P,), in squared units; estimated where the parts came as points.
        names: of the parts.
        frames: (P, 4, 4) rigid, from a part's frame (still in units) to the pose that it came in.
        unit: length of a unit in the lengths of the input.
        poses: the true poses (P, 4, 4) in units, where they are known.
        classes: semantic classes (P,), where known.
        geometry_ids: (P,), equal for parts that may stand for each other.
        mirrors: (P, 3) bool, axes of the frame along which a part is mirror-symmetric, where known.
        contacts: (P, P, 4), where known: whether parts i and j touch, and the point on i, in the frame of i.
        meshes: as they came, where the parts are meshes.
        category: such as "chair", where known.

    Raises:
        ValueError: fields whose shapes do not fit, fewer than two or more than 64 parts, or two of one name.
    """

    points: Tensor
    extents: Tensor
    areas: Tensor
    names: tuple[str, ...]
    frames: Tensor
    unit: float = 1.0
    poses: Tensor | None = None
    classes: Tensor | None = None
    geometry_ids: Tensor
    mirrors: Tensor | None = None
    contacts: Tensor | None = None
    meshes: tuple[Any, ...] | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        count = len(self.points)
        if self.points.ndim != 3 or self.points.shape[-1] != 3:
            raise ValueError(f"The parts' points must be (parts, points, 3); got {tuple(self.points.shape)}.")
        _check_count(count)
        shapes = {
            "extents": (count, 3), "areas": (count,), "frames": (count, 4, 4), "poses": (count, 4, 4), "classes": (count,),
            "geometry_ids": (count,), "mirrors": (count, 3), "contacts": (count, count, 4),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"{name} is {tuple(value.shape)} but must be {shape} for {count} parts.")
        if len(self.names) != count or (self.meshes is not None and len(self.meshes) != count):
            raise ValueError(f"There are {count} parts but {len(self.names)} names. Give one for each.")
        twice = next((name for i, name in enumerate(self.names) if name in self.names[:i]), None)
        if twice is not None:
            raise ValueError(f"Two parts are called {twice!r}. Rename one.")
        if not torch.isfinite(self.points).all():
            raise ValueError("The parts' points have NaN or infinite coordinates.")

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: Sequence[int]) -> PartSet:
        """The parts in another order, or some of them."""
        i = torch.as_tensor(list(rows))
        per_part = ("points", "extents", "areas", "frames", "poses", "classes", "geometry_ids", "mirrors")
        chosen: dict[str, Any] = {name: None if getattr(self, name) is None else getattr(self, name)[i] for name in per_part}
        chosen["contacts"] = None if self.contacts is None else self.contacts[i][:, i]
        chosen["names"] = tuple(self.names[k] for k in i.tolist())
        chosen["meshes"] = None if self.meshes is None else tuple(self.meshes[k] for k in i.tolist())
        return dataclasses.replace(self, **chosen)

    @classmethod
    def from_meshes(
        cls,
        meshes: Sequence[Trimesh],
        names: Sequence[str] | None = None,
        *,
        truth: bool = False,
        points: int = POINTS,
        seed: int = 0,
        **fields: Any,
    ) -> PartSet:
        """Parts from meshes.

        Args:
            truth: the meshes are in their assembled pose, which becomes `poses`; it reaches nothing else.
            points: samples of each surface.
            seed: of the random turns and of the samples; both are a function of it and of the mesh alone, not of its pose's order.
            **fields: `classes`, `category`, `geometry_ids`.

        Raises:
            ValueError: a mesh without surface, with NaN vertices, or without bounds; names it.
        """
        _check_count(len(meshes))
        names = tuple(names or (f"part {i}" for i in range(len(meshes))))
        boxed = [_boxed_mesh(mesh, name, seed) for mesh, name in zip(meshes, names, strict=True)]
        unit = _unit([box for _, _, box in boxed])
        clouds, frames = [], []
        for mesh, (turned, frame, _) in zip(meshes, boxed, strict=True):
            from trimesh.sample import sample_surface

            surface, _ = sample_surface(turned, points, seed=content_seed(mesh.vertices, seed, SURFACE))
            clouds.append(np.asarray(surface) / unit)
            frames.append(_in_units(frame, unit))
        areas = [turned.area / unit**2 for turned, _, _ in boxed]
        return cls._of(
            clouds, [box / unit for _, _, box in boxed], areas, frames, names, unit, truth, meshes=tuple(meshes), **fields
        )

    @classmethod
    def from_clouds(
        cls,
        clouds: Sequence[Tensor | np.ndarray],
        names: Sequence[str] | None = None,
        *,
        truth: bool = False,
        seed: int = 0,
        **fields: Any,
    ) -> PartSet:
        """Parts from point clouds (N, 3), all with the same number of points; arguments as `from_meshes`.

        The area of a part is estimated from the distances of its points.

        Raises:
            ValueError: clouds of different lengths, of one place, or with NaN.
        """
        _check_count(len(clouds))
        names = tuple(names or (f"part {i}" for i in range(len(clouds))))
        arrays = [np.asarray(cloud, dtype=np.float64) for cloud in clouds]
        if len({array.shape for array in arrays}) > 1 or any(array.ndim != 2 or array.shape[1] != 3 for array in arrays):
            raise ValueError(f"Clouds must have one shape (N, 3); got {sorted({array.shape for array in arrays})}.")
        boxed = [_boxed(array, name, content_seed(array, seed, REPOSE)) for array, name in zip(arrays, names, strict=True)]
        unit = _unit([box for _, box in boxed])
        frames = [_in_units(frame, unit) for frame, _ in boxed]
        local = [((array - frame[:3, 3]) @ frame[:3, :3]) / unit for array, (frame, _) in zip(arrays, boxed, strict=True)]
        areas = [float(Surface(torch.from_numpy(cloud)).areas.sum()) for cloud in local]
        return cls._of(local, [box / unit for _, box in boxed], areas, frames, names, unit, truth, **fields)

    @classmethod
    def _of(
        cls, clouds: Any, extents: Any, areas: Any, frames: Any, names: tuple[str, ...], unit: float, truth: bool, **fields: Any
    ) -> PartSet:
        boxes, rigid = torch.from_numpy(np.array(extents)), torch.from_numpy(np.array(frames))
        classes = fields.get("classes")
        fields.setdefault("geometry_ids", geometry_classes(boxes, classes))
        return cls(
            points=torch.from_numpy(np.array(clouds)).float(), extents=boxes.float(), areas=torch.tensor(areas,
            dtype=torch.float32), names=names, frames=rigid, unit=unit, poses=rigid if truth else None, **fields,
        )  # fmt: skip

    def centred(self, poses: Tensor) -> Tensor:
        """Poses (..., P, 4, 4), float64, with the centroid of the whole surface at the origin, where a model's clouds have it."""
        poses = poses.double().clone()
        middles = transform(self.points.double(), poses).mean(-2)
        shares = self.areas.double() / self.areas.double().sum()
        poses[..., :3, 3] -= (shares[:, None] * middles).sum(-2, keepdim=True)
        return poses

    def to_input(self, poses: Tensor) -> Tensor:
        """Motions (..., P, 4, 4) of the parts as they came, in lengths of the input, for poses (..., P, 4, 4) in units."""
        moved = poses.double() @ invert(self.frames.double())
        moved[..., :3, 3] *= self.unit
        return moved


def _check_count(count: int) -> None:
    if not 2 <= count <= MOST_PARTS:
        raise ValueError(f"There {'is 1 part' if count == 1 else f'are {count} parts'}. An assembly has 2 to {MOST_PARTS}.")


def _in_units(frame: np.ndarray, unit: float) -> np.ndarray:
    scaled = frame.copy()
    scaled[:3, 3] /= unit
    return scaled


def _unit(boxes: Sequence[np.ndarray]) -> float:
    return float(max(box.max() for box in boxes))


def content_seed(vertices: np.ndarray, seed: int, stream: int) -> int:
    """A seed of the content, so that parts in another order draw the same numbers."""
    content = hashlib.sha256(np.ascontiguousarray(vertices, dtype=np.float64).tobytes()).digest()
    return mix(mix(seed, stream) ^ int.from_bytes(content[:4], "little"), stream)


def _boxed_mesh(mesh: Any, name: str, seed: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """The mesh in the frame of its box, the rigid frame (4, 4) that leads back, and the sides of the box."""
    vertices = np.asarray(mesh.vertices, dtype=np.float64)
    if np.isfinite(vertices).all() and not np.isfinite(mesh.area):
        raise ValueError(f"The part {name!r} is too large: coordinates reach {np.abs(vertices).max():.3g}. Scale it.")
    if len(mesh.faces) == 0 or mesh.area <= 0:
        raise ValueError(f"The part {name!r} has no surface. Remove it, or repair the mesh.")
    frame, box = _boxed(vertices, name, content_seed(vertices, seed, REPOSE))
    turned = mesh.copy()
    turned.apply_transform(np.linalg.inv(frame))
    return turned, frame, box


def _boxed(points: np.ndarray, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The frame (4, 4) of the smallest box of points, and its sides, ascending; found in a random pose."""
    from trimesh.bounds import oriented_bounds

    if not np.isfinite(points).all():
        raise ValueError(f"The part {name!r} has NaN or infinite coordinates. Repair it, or remove it.")
    if len(points) == 0 or np.ptp(points, axis=0).max() <= 0:
        raise ValueError(f"The part {name!r} has no extent. Remove it, or repair it.")
    centre = points.mean(0)
    turn = random_rotations(1, torch.Generator().manual_seed(seed))[0].numpy()
    try:
        to_box, sides = oriented_bounds((points - centre) @ turn.T)
    except Exception:  # qhull, of flat or thin parts: the axes of the covariance then
        to_box, sides = _principal_box((points - centre) @ turn.T)
    order = np.argsort(sides, kind="stable")
    to_box, sides = to_box[[*order, 3]], np.asarray(sides)[order]
    if np.linalg.det(to_box[:3, :3]) < 0:
        to_box[0] *= -1
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = turn, -turn @ centre
    return np.linalg.inv(to_box @ whole), sides


def _principal_box(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A box along the axes of the covariance: (4, 4) into its frame, and its sides."""
    _, axes = np.linalg.eigh(np.cov(points.T))
    if np.linalg.det(axes) < 0:
        axes[:, 0] *= -1
    low, high = (points @ axes).min(0), (points @ axes).max(0)
    to_box = np.asarray(pose_matrix(torch.from_numpy(axes.T.copy()), torch.from_numpy(-(low + high) / 2)))
    return to_box, high - low


def content_order(parts: PartSet) -> list[int]:
    """An order of the parts that does not depend on the order that they came in."""
    keys = [
        (round(-float(a), 6), hashlib.sha256(p.numpy().tobytes()).hexdigest())
        for a, p in zip(parts.areas, parts.points, strict=True)
    ]
    return sorted(range(len(parts)), key=keys.__getitem__)
