"""What an assembly is written as: poses, meshes, a cloud, pictures from around, and a page to look at it.

`poses.json`: matrices are 4 x 4, row-major, for column vectors: they move the parts as they were given, in their lengths.
"""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.assembly.nearest_grid import Surface
from genkit.assembly.parts import PartSet
from genkit.assembly.picture import SAMPLES, ball, draw, palette
from genkit.assembly.rigid import invert, pose_matrix, random_rotations, transform
from genkit.assembly.surfaces import part_surface
from genkit.files import write_atomic

VIEWS = 8  # of the turntable
WRITTEN = ("energy", "coverage", "fit", "pieces", "agreement")  # scores of each hypothesis
MOST_TRIANGLES = 200_000  # of a page; meshes with more are shown as samples of their surface


def write_poses(file: Path, parts: PartSet, poses: Tensor, scores: dict[str, Tensor], **settings: Any) -> dict[str, Any]:
    """Write poses (H, P, 4, 4) of the parts in units, best first; returns the document.

    Args:
        scores: as `genkit.assembly.hypotheses.judge` gives them.
        **settings: go into the document as they are: `units`, `seed`, ...
    """
    motions = parts.to_input(poses)
    hypotheses = []
    for h, matrices in enumerate(motions):
        values = {key: scores[key][h].item() for key in WRITTEN if key in scores}
        hypotheses.append({**values, "matrices": matrices.tolist()})
    named = [
        {"name": name, "matrix": motion.tolist(), "class": int(number), "residual": residual.item() * parts.unit}
        for name, motion, number, residual in zip(parts.names, motions[0], parts.geometry_ids, scores["residual"][0], strict=True)
    ]
    frame = {"version": 1, "unit_length": parts.unit, "frame": "that of the reference or the model"}
    document = {**frame, **settings, "parts": named, "score": hypotheses[0]["energy"], "hypotheses": hypotheses}
    write_atomic(file, (json.dumps(document, indent=1) + "\n").encode())
    return document


def write_glb(file: Path, parts: PartSet, poses: Tensor) -> None:
    """Write the original meshes of poses (P, 4, 4), one coloured node for each part."""
    import trimesh

    scene = trimesh.Scene()
    for mesh, name, motion, color in zip(parts.meshes or (), parts.names, parts.to_input(poses), palette(len(parts)), strict=True):
        plain = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        plain.visual = trimesh.visual.TextureVisuals(
            material=trimesh.visual.material.PBRMaterial(
                baseColorFactor=[*color.astype(int), 255], metallicFactor=0.0, doubleSided=True
            )
        )
        scene.add_geometry(plain, node_name=name, geom_name=name, transform=motion.numpy())
    write_atomic(file, scene.export(file_type="glb"))


def write_ply(file: Path, parts: PartSet, poses: Tensor) -> None:
    """Write the samples of the assembled parts, coloured by part."""
    import trimesh

    points = transform(parts.points.double(), poses) * parts.unit
    colors = np.repeat(palette(len(parts)), points.shape[1], 0).astype(np.uint8)
    write_atomic(file, trimesh.PointCloud(points.reshape(-1, 3).numpy(), colors=colors).export(file_type="ply"))


def write_turntable(file: Path, parts: PartSet, poses: Tensor, size: int = 320) -> None:
    """Write views (two rows of four) of the assembly from around."""
    points, normals = in_place(parts, poses)
    frame, columns = ball(np.concatenate(points)), VIEWS // 2
    sheet = Image.new("RGB", (columns * size, 2 * size))
    for k in range(VIEWS):
        view = draw(points, normals, palette(len(parts)), size=size, yaw=35 + 360 * k / VIEWS, frame=frame)
        sheet.paste(view, (k % columns * size, k // columns * size))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_atomic(file, buffer.getvalue())


def in_place(parts: PartSet, poses: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Samples of the surface of each part in poses (P, 4, 4), in units, and their normals: what `picture.draw` takes."""
    surfaces = [_shown(parts, i) for i in range(len(parts))]
    points = [transform(s.points.double(), pose).numpy() for s, pose in zip(surfaces, poses, strict=True)]
    normals = [(s.normals.double() @ pose[:3, :3].T).numpy() for s, pose in zip(surfaces, poses, strict=True)]
    return points, normals


def write_viewer(
    file: Path, parts: PartSet, poses: Tensor, history: list[Tensor] | None, note: str = "", start: Tensor | None = None
) -> None:
    """Write a page that shows the assemblies (H, P, 4, 4), the first one's history, and needs no network.

    Args:
        start: how each assembly begins (P, 4, 4); by default scattered: parts in a ring, turned at random, since what pose they
            came in may be the answer.
    """
    triangles = [_triangles(parts, i, MOST_TRIANGLES // len(parts)) for i in range(len(parts))]
    corners = [t.reshape(-1, 3) @ pose[:3, :3].numpy().T + pose[:3, 3].numpy() for t, pose in zip(triangles, poses[0], strict=True)]
    centre, radius = ball(np.concatenate(corners))
    colors = palette(len(parts)) / 255
    first = _scattered(parts, torch.from_numpy(centre), radius) if start is None else start
    begun = "scattered" if start is None else "as given"
    assemblies = []
    for h, pose in enumerate(poses):
        steps = [first, *(history or []), pose] if h == 0 else [first, pose]
        names = [begun, *(f"step {k + 1}" for k in range(len(steps) - 2)), "assembled"]
        assemblies.append({"name": f"{h + 1}", "frames": [[_columns(one) for one in frame] for frame in steps], "steps": names})
    data = {
        "parts": [
            {"triangles": base64.b64encode(t.astype("<f4").tobytes()).decode(), "color": [round(float(c), 3) for c in color]}
            for t, color in zip(triangles, colors, strict=True)
        ],
        "assemblies": assemblies, "centre": [round(float(c), 5) for c in centre], "radius": 1.15 * radius, "note": note,
    }  # fmt: skip
    page = (Path(__file__).parent / "viewer.html").read_text(encoding="utf-8")
    # "</" cannot end the script element then, whatever a note or a name holds.
    write_atomic(file, page.replace("__DATA__", json.dumps(data).replace("</", "<\\/")).encode())


def _shown(parts: PartSet, i: int) -> Surface:
    """Samples of part i in its frame, as many as its share of the surface is, so that all parts look solid alike."""
    if parts.meshes is None:
        return Surface(parts.points[i])
    count = max(1000, round(SAMPLES * float(parts.areas[i] / parts.areas.sum())))
    return part_surface(parts, i, count)


def _triangles(parts: PartSet, i: int, most: int) -> np.ndarray:
    """Triangles (T, 3, 3) of part i in its frame; small ones at the samples where there is no mesh, or too large a one."""
    if parts.meshes is not None and len(parts.meshes[i].faces) <= most:
        corners = torch.from_numpy(np.array(parts.meshes[i].triangles, dtype=np.float64)).reshape(-1, 3) / parts.unit
        return transform(corners, invert(parts.frames[i].double())).reshape(-1, 3, 3).numpy()
    surface = part_surface(parts, i)
    normals = surface.normals.double()
    side = torch.linalg.cross(normals, torch.eye(3, dtype=torch.float64)[normals.abs().argmin(-1)])
    other, size = torch.linalg.cross(normals, side), 0.01
    points = surface.points.double()
    return torch.stack([points + size * side, points - size * side, points + size * other], 1).numpy()


def _scattered(parts: PartSet, centre: Tensor, radius: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    angle = torch.arange(len(parts), dtype=torch.float64) * (2 * math.pi / len(parts))
    place = centre + 1.2 * radius * torch.stack([angle.cos(), 0.3 * angle.sin(), angle.sin()], -1)
    return pose_matrix(random_rotations(len(parts), generator), place)


def _columns(pose: Tensor) -> list[float]:
    """A pose as WebGL has it."""
    return [round(x, 6) for x in pose.T.flatten().tolist()]
