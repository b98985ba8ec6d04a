"""Heat maps as files: a sheet of overlays for people, arrays for programs."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from genkit.attention.heatmaps import ImageMaps
from genkit.images import contact_sheet

_STOPS = np.array([[15, 10, 60], [110, 20, 130], [215, 60, 90], [250, 150, 60], [255, 245, 170]], dtype=np.float64)  # cold to hot
_OPACITY = 0.8  # of the hottest place


def sheet(image: Image.Image, maps: ImageMaps) -> Image.Image:
    """A row for each word: the picture in grey under the word's map, averaged over all layers, and of the last layer alone.

    Colours run from the lowest to the highest value of each map; the row's label says which those are in the mean.
    """
    last = list(maps.layers)[-1]
    size = (image.height, image.width)
    rows, labels = [], []
    for word in maps.words:
        mean = maps.of(word)
        rows.append([image, overlay(image, maps.of(word, size=size)), overlay(image, maps.of(word, layer=last, size=size))])
        labels.append(f"{word}\n{float(mean.min()):.3f} to {float(mean.max()):.3f}")
    return contact_sheet(rows, labels, ["picture", "all layers", "last layer"], "Attention to each word")


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in grey under a map (height, width), from its lowest value (clear) to its highest."""
    values = heat.double().numpy()
    span = values.max() - values.min()
    share = (values - values.min()) / (span or 1.0)
    place = share * (len(_STOPS) - 1)
    colour = np.stack([np.interp(place, np.arange(len(_STOPS)), _STOPS[:, c]) for c in range(3)], -1)
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    opacity = _OPACITY * share[..., None]
    return Image.fromarray(np.rint((1 - opacity) * grey + opacity * colour).astype(np.uint8))


def as_npz(maps: ImageMaps) -> bytes:
    """NumPy's .npz: `words` (W,), `mean` (W, h, w), `timesteps` (T,), `levels` (T, W, h, w), and `layer:NAME` (W, h, w) of each."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "words": np.array(maps.words),
        "mean": maps.mean.numpy(),
        "timesteps": np.array([t for t, _ in maps.levels]),
        "levels": np.stack([value.numpy() for _, value in maps.levels]),
    }
    arrays |= {f"layer:{name}": value.numpy() for name, value in maps.layers.items()}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
