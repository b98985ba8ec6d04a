"""Collections of objects whose assembly is known: where they are, and what the whole of one looks like to a scanner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from genkit.assembly.parts import PartSet
from genkit.assembly.rigid import transform
from genkit.noise import mix


def find_objects(root: str | Path) -> list[Path]:
    """Objects below a folder, in the order of their paths: folders with two meshes or more, scenes, `.npz` files.

    Raises:
        FileNotFoundError: no such folder, or nothing of the kind in it.
    """
    from genkit.data.meshes import MESHES, SCENES

    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r}.")
    meshes: dict[Path, int] = {}
    found = []
    for file in root.rglob("*"):
        kind = file.suffix.lower()
        if kind in MESHES:
            meshes[file.parent] = meshes.get(file.parent, 0) + 1
        elif kind in (*SCENES, ".npz"):
            found.append(file)
    found += [folder for folder, count in meshes.items() if count > 1]
    if not found:
        raise FileNotFoundError(f"Below {str(root)!r} is no object: no folder of two meshes or more, no .glb, no .npz.")
    return sorted(found)


def reference_cloud(parts: PartSet, points: int = 8192, seed: int = 0) -> Tensor:
    """An area-uniform sample (points, 3) of the true whole, in the lengths of the input: nothing tells which part a point is of.

    Of meshes it is independent of the samples that are assembled. Of clouds it is some of their points.

    Raises:
        ValueError: the true poses are not known.
    """
    if parts.poses is None:
        raise ValueError("The whole is not known of parts without true poses.")
    generator = torch.Generator().manual_seed(mix(seed, 4))
    if parts.meshes is not None:
        import trimesh

        motions = parts.to_input(parts.poses).numpy()
        placed_meshes = [mesh.copy().apply_transform(motion) for mesh, motion in zip(parts.meshes, motions, strict=True)]
        whole = trimesh.util.concatenate(placed_meshes)
        sample, _ = trimesh.sample.sample_surface(whole, points, seed=mix(seed, 4))
        return torch.tensor(sample)[torch.randperm(points, generator=generator)]
    placed = transform(parts.points.double(), parts.poses.double()).flatten(0, 1) * parts.unit
    weights = (parts.areas / parts.areas.sum()).double().repeat_interleave(parts.points.shape[1])
    return placed[torch.multinomial(weights, min(points, len(placed)), generator=generator)]


def centred(parts: PartSet) -> PartSet:
    """The same parts, the truth moved so that the centroid of the surface is at the origin, where a model's clouds have it."""
    return parts if parts.poses is None else dataclasses.replace(parts, poses=parts.centred(parts.poses))
