"""Pictures of assemblies without a graphics library: shaded samples of the surfaces, the nearest one wins each pixel.

A parallel projection; each sample is as bright as its normal faces the light, from either side, and is drawn as a small square.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

SAMPLES = 100_000  # of all parts together: enough that a picture of 320 pixels has no holes
_LIGHT = np.array([0.35, 0.8, 0.5]) / np.linalg.norm([0.35, 0.8, 0.5])
_PAPER = (250, 250, 250)


def palette(count: int) -> np.ndarray:
    """Colours (count, 3) from 0 to 255, neighbours far apart (steps of the golden ratio around the colour circle)."""
    hues = (0.58 + 0.61803398875 * np.arange(count)) % 1
    tones = [(0.55, 0.9), (0.75, 0.75), (0.4, 0.95)]
    return np.array([colorsys.hsv_to_rgb(hue, *tones[i % 3]) for i, hue in enumerate(hues)]) * 255


def view_matrix(yaw: float, pitch: float) -> np.ndarray:
    """Rotation (3, 3) of a camera that looks at the origin, y up; angles in degrees. Rows: right, up, towards the viewer."""
    a, b = np.radians(yaw), np.radians(pitch)
    around = np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return tilt @ around


def draw(
    points: Sequence[np.ndarray],
    normals: Sequence[np.ndarray],
    colors: np.ndarray,
    *,
    size: int = 512,
    yaw: float = 35.0,
    pitch: float = 20.0,
    frame: tuple[np.ndarray, float] | None = None,
) -> Image.Image:
    """One view of parts.

    Args:
        points, normals: samples of each part (N, 3), y up.
        colors: of each part (P, 3), 0 to 255.
        size: of the picture, square.
        frame: centre and radius of the ball that fills the picture; that of the points by default.
    """
    cloud, facing = np.concatenate(points), np.concatenate(normals)
    owner = np.repeat(np.arange(len(points)), [len(p) for p in points])
    centre, radius = frame or ball(cloud)
    view = view_matrix(yaw, pitch)
    local = (cloud - centre) @ view.T / radius
    light = 0.35 + 0.65 * np.abs(facing @ (view.T @ _LIGHT))
    shaded = colors[owner] * light[:, None]
    canvas = np.empty((size, size, 3))
    canvas[:] = _PAPER
    order = np.argsort(local[:, 2])  # the nearest last, so that it stays
    column = np.round((local[order, 0] * 0.48 + 0.5) * size).astype(int)
    row = np.round((0.5 - local[order, 1] * 0.48) * size).astype(int)
    flat = canvas.reshape(-1, 3)
    depth = np.full(size * size, -np.inf)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        r, c = row + dy, column + dx
        inside = (r >= 0) & (r < size) & (c >= 0) & (c < size)
        index = (r * size + c)[inside]
        last = np.full(size * size, -1)
        last[index] = np.flatnonzero(inside)  # of repeated pixels numpy keeps the last
        hit = last >= 0
        nearer = hit.copy()
        nearer[hit] = local[order[last[hit]], 2] >= depth[hit]
        flat[nearer] = shaded[order[last[nearer]]]
        depth[nearer] = local[order[last[nearer]], 2]
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


def ball(cloud: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and radius of a ball about the points' box."""
    centre = (cloud.min(0) + cloud.max(0)) / 2
    return centre, float(np.linalg.norm(cloud - centre, axis=1).max()) or 1.0
