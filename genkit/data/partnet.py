"""Reads the PartNet part-assembly benchmark (Huang et al. 2020, arXiv 2006.07793) and its fields from `.npz`.

`{Chair,Table,Lamp}.{train,val,test}.npy` hold numbers of shapes; `shape_data/{id}_level{L}.npy` and
`contact_points/pairs_with_contact_points_{id}_level{L}.npy` are pickles, which could run anything. They are read by an unpickler
that knows arrays and plain values only (`genkit.data.array_pickle`), and only if that is allowed; what was read is kept as `.npz`,
which is no pickle.

Fields of a shape: `part_pcs` (P, N, 3) in each part's frame, `part_poses` (P, 7) = translation and quaternion (w, x, y, z), or
(P, 4, 4); `part_ids` (P,), `geo_part_ids` (P,), `sym` (P, 3), `contacts` (P, P, 4) with the point on part i in the frame of i.

Repaired on reading: quaternions of another length than 1; pose matrices that mirror (the points are reflected instead); the order
of the parts, which tells what they are (shuffled by the shape's content). Where the benchmark itself turned a mirror into a
rotation by negating it, nothing in its files says so.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.assembly.equivalence import geometry_classes
from genkit.assembly.parts import MOST_PARTS, SURFACE, PartSet, content_seed
from genkit.assembly.rigid import matrix_to_quaternion, pose_matrix, quaternion_to_matrix
from genkit.data import array_pickle
from genkit.data.npy import parse_npy, read_header, read_npz, texts_of
from genkit.errors import unknown

CATEGORIES = ("Chair", "Table", "Lamp")
SPLITS = ("train", "val", "test")
MOST_BYTES = 64 * 2**20  # of a shape's file
MOST_UNPACKED = 256 * 2**20


def read_pickled_array(file: Path, *, allow_pickle: bool) -> Any:
    """What a `.npy` file holds: an array, or the object of a pickled one, if that is allowed.

    Raises:
        FileNotFoundError, ValueError: no such file; too large; damaged; a pickle that is not allowed, or holds more than arrays and
            plain values.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{str(file)!r} has more than {MOST_BYTES >> 20} MiB, too much for one shape.")
    stream = io.BytesIO(file.read_bytes())
    try:
        shape, _, dtype = read_header(stream)
        if not dtype.hasobject:
            return parse_npy(stream.getvalue())
        content = array_pickle.load(stream) if allow_pickle else None
    except Exception as error:  # whatever a damaged pickle makes of its few functions
        raise ValueError(f"{str(file)!r} is damaged, or a pickle of more than arrays and plain values: {error!s:.200}.") from error
    if not allow_pickle:
        raise ValueError(f"{str(file)!r} is a pickle. Pass --allow-pickle to read it, restricted to arrays and plain values.")
    return content.item() if isinstance(content, np.ndarray) and shape == () else content


def read_arrays(path: Path, *, truth: bool = True, allow_pickle: bool = False, **fields: Any) -> PartSet:
    """Parts of a `.npz` or of a benchmark's `.npy` with the fields above, `part_pcs` at least.

    Args:
        truth: for clouds without `part_poses`: they are in their assembled pose. With poses, those are the truth.
        allow_pickle: for `.npy`.
        **fields: `category`; `seed` of the frames of clouds without poses.

    Raises:
        FileNotFoundError, ValueError: see `read_pickled_array`; fields that are missing or do not fit.
    """
    if path.suffix.lower() == ".npz":
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{str(path)!r} has more than {MOST_BYTES >> 20} MiB, too much for one object.")
        try:
            content: Any = read_npz(path, MOST_UNPACKED)
        except (ValueError, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as .npz ({error}). Write it again, without objects.") from error
    else:
        content = read_pickled_array(path, allow_pickle=allow_pickle)
    if not isinstance(content, dict) or "part_pcs" not in content:
        raise ValueError(f"{str(path)!r} holds no parts: there is no `part_pcs` (parts, points, 3) in it.")
    return from_fields(content, name=str(path), truth=truth, **fields)


def from_fields(content: dict[str, Any], *, name: str = "the shape", truth: bool = True, **fields: Any) -> PartSet:
    """Parts of the benchmark's fields; `read_arrays` has the arguments."""
    points = _numbers(content["part_pcs"], "part_pcs", name).astype(np.float32)
    if points.ndim != 3 or points.shape[-1] != 3 or not points.shape[1]:
        raise ValueError(f"`part_pcs` of {name} is {points.shape}. It must be (parts, points, 3).")
    if not 2 <= len(points) <= MOST_PARTS:
        raise ValueError(f"{name} has {len(points)} parts. An assembly has 2 to {MOST_PARTS}.")
    if not np.isfinite(points).all():
        raise ValueError(f"`part_pcs` of {name} has NaN or infinite coordinates.")
    if content.get("part_poses") is None:
        return PartSet.from_clouds(list(points), _names(content, len(points), name), truth=truth, **fields)
    fields.pop("seed", None)
    poses = _poses(_numbers(content["part_poses"], "part_poses", name), len(points), name)
    cloud, poses = _rectified(torch.from_numpy(points), poses)

    def tensor(key: str, dtype: torch.dtype) -> Tensor | None:
        return None if content.get(key) is None else torch.from_numpy(_numbers(content[key], key, name)).to(dtype)

    extents = cloud.amax(1) - cloud.amin(1)
    ids = tensor("geo_part_ids", torch.long)
    parts = PartSet(
        points=cloud, extents=extents, areas=_areas(cloud),
        names=_names(content, len(points), name) or tuple(map(str, range(len(points)))),
        frames=torch.eye(4, dtype=torch.float64).repeat(len(points), 1, 1), poses=poses, classes=tensor("part_ids", torch.long),
        geometry_ids=geometry_classes(extents, tensor("part_ids", torch.long)) if ids is None else ids,
        mirrors=tensor("sym", torch.bool), contacts=tensor("contacts", torch.float32), **fields,
    )  # fmt: skip
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(content_seed(points, 0, SURFACE)))
    return parts if "names" in content else parts[order.tolist()]


def write_npz(parts: PartSet, file: Path) -> None:
    """Write parts so that `read_arrays` gives the same, in the same order, to the last bit of the points and to rounding of the
    poses.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    from genkit.files import write_atomic

    fields: dict[str, Any] = {"part_pcs": parts.points, "part_poses": parts.poses, "part_ids": parts.classes}
    fields |= {"geo_part_ids": parts.geometry_ids, "sym": parts.mirrors, "contacts": parts.contacts}
    arrays = {key: value.numpy() for key, value in fields.items() if value is not None}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, names=np.array(parts.names), **arrays)
    write_atomic(file, buffer.getvalue())


class PartNet(Sequence[PartSet]):
    """A split of one category; shapes are read when they are asked for, and kept as `.npz` after their first reading."""

    def __init__(self, root: Path, category: str, ids: list[int], level: int, allow_pickle: bool) -> None:
        self.root, self.category, self.ids, self.level, self.allow_pickle = root, category, ids, level, allow_pickle

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        kept = self.root / "npz" / f"{self.ids[i]}_level{self.level}.npz"
        if not kept.is_file():
            parts = self._read(self.ids[i])
            if not os.access(self.root, os.W_OK):
                return parts
            kept.parent.mkdir(exist_ok=True)
            write_npz(parts, kept)
        return read_arrays(kept, category=self.category.lower())

    def _read(self, number: int) -> PartSet:
        content = read_pickled_array(self.root / "shape_data" / f"{number}_level{self.level}.npy", allow_pickle=self.allow_pickle)
        touching = self.root / "contact_points" / f"pairs_with_contact_points_{number}_level{self.level}.npy"
        if touching.is_file():
            content = {**content, "contacts": read_pickled_array(touching, allow_pickle=self.allow_pickle)}
        return from_fields(content, name=f"shape {number}", category=self.category.lower())


def load_partnet(root: str | Path, category: str, split: str, level: int = 3, *, allow_pickle: bool = False) -> PartNet:
    """A split of the benchmark. The published scripts evaluate `val`; say which one you use.

    Args:
        root: the folder with `Chair.test.npy`, `shape_data` and `contact_points`.
        category: Chair, Table or Lamp.
        split: train, val or test.
        level: of PartNet's hierarchy, 1 (coarse) to 3 (fine).
        allow_pickle: read the pickles of shapes that are not kept as `.npz` yet.

    Raises:
        FileNotFoundError: the folder has no such list.
        ValueError: an unknown category or split.
    """
    category = category.capitalize()
    if category not in CATEGORIES:
        raise unknown("category", category, CATEGORIES)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    ids = read_pickled_array(Path(root) / f"{category}.{split}.npy", allow_pickle=allow_pickle)
    return PartNet(Path(root), category, [int(i) for i in np.asarray(ids).ravel()], level, allow_pickle)


def pose_vectors(poses: Tensor) -> Tensor:
    """The benchmark's (P, 7) of poses (P, 4, 4): translation, then the quaternion (w, x, y, z)."""
    return torch.cat([poses[:, :3, 3], matrix_to_quaternion(poses[:, :3, :3])], -1)


def _numbers(value: Any, key: str, name: str) -> np.ndarray:
    """A field as an array of whole numbers or float64."""
    try:
        array = np.asarray(value)
    except Exception as error:  # lists of different lengths, and what else a pickle may hold
        raise ValueError(f"`{key}` of {name} is no array ({error!s:.100}).") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"`{key}` of {name} holds no numbers but {array.dtype}.")
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)


def _names(content: dict[str, Any], count: int, name: str) -> tuple[str, ...] | None:
    if "names" not in content:
        return None
    try:
        names = texts_of(np.asarray(content["names"]))
    except ValueError as error:
        raise ValueError(f"`names` of {name} are no names ({error}).") from error
    if len(names) != count:
        raise ValueError(f"{name} has {len(names)} names, but {count} parts.")
    return tuple(names)


def _poses(values: np.ndarray, count: int, name: str) -> Tensor:
    poses = torch.from_numpy(values.astype(np.float64))
    if poses.ndim and len(poses) != count:
        raise ValueError(f"{name} has {len(poses)} `part_poses`, but {count} parts.")
    if not torch.isfinite(poses).all():
        raise ValueError(f"`part_poses` of {name} has NaN or infinite numbers.")
    if poses.ndim == 2 and poses.shape[1] == 7:
        return pose_matrix(quaternion_to_matrix(poses[:, 3:]), poses[:, :3])
    if poses.ndim == 3 and tuple(poses.shape[1:]) == (4, 4):
        return poses
    raise ValueError(f"`part_poses` of {name} is {tuple(values.shape)}. It must be (parts, 7) or (parts, 4, 4).")


def _rectified(points: Tensor, poses: Tensor) -> tuple[Tensor, Tensor]:
    """Points and proper poses that put them at the same places: R x = (-R)(-x)."""
    mirrored = torch.where(torch.linalg.det(poses[:, :3, :3]) < 0, -1.0, 1.0)
    poses = poses.clone()
    poses[:, :3, :3] *= mirrored.to(poses)[:, None, None]
    return points * mirrored.to(points)[:, None, None], poses


def _areas(points: Tensor) -> Tensor:
    """Areas (P,) of surfaces, from the distances of their samples."""
    from genkit.assembly.nearest_grid import Surface

    return torch.stack([Surface(cloud).areas.sum() for cloud in points])
