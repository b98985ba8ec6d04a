"""The embedded models: small, really trained, in diffusers' folder layout. Imports nothing heavy.

Each is a folder `models/NAME` beside this file with its weights (safetensors) and a card, `card.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genkit.errors import unknown

ROOT = Path(__file__).parent / "models"

# What `genkit zoo train NAME` can make, and what each is.
TRAINABLE = {
    "autoencoder": "the autoencoder of `digits` alone: 32 x 32 RGB to 8 x 8 x 4",
    "digits": "text-to-image latent diffusion of coloured handwritten digits, 32 x 32",
    "digits-classifier": "classifier of digit, ink and paper; the one that guides",
    "digits-noisy-classifier": "classifier of noisy latents of `digits`: digit, ink and paper at every noise level",
    "digits-discriminator": "tells noisy real latents from those of samples of `digits`; it corrects them (10 and 30 steps)",
    "digits-turbo": "few-step student of `digits`, 1 to 4 steps without classifier-free guidance",
    "scenes": "layout-to-image latent diffusion of 64 x 64 scenes with several handwritten digits and their boxes",
    "scenes-prior": "which layouts of scenes are likely: a diffusion model of classes and boxes",
    "furniture": "clouds of chairs, tables, lamps and cabinets: the templates that parts are assembled on",
    "digits-judge": "independent classifier of digit, ink and paper; only ever measures",
}


def names() -> list[str]:
    """The models that this installation carries, sorted."""
    if not ROOT.is_dir():
        return []
    return sorted(p.name for p in ROOT.iterdir() if (p / "model_index.json").is_file() or (p / "config.json").is_file())


def path(name: str) -> Path:
    """The folder of an embedded model; any `from_pretrained` takes it.

    Raises:
        ValueError: no such model; the message names the closest, or how to train one that is missing.

    Example:
        >>> StableDiffusionPipeline.from_pretrained(genkit.zoo.path("digits"))
    """
    present = names()
    if name in present:
        return ROOT / name
    if name in TRAINABLE:
        raise ValueError(f"This installation carries no weights for {name!r}. Train them with `genkit zoo train {name} --out DIR`.")
    raise unknown("embedded model", name, present)


def folder(model: str | Path) -> Path:
    """The folder of an embedded model, which wins over a folder of its name, or else the path itself; it may not be there.

    Raises:
        ValueError: a model that could be embedded, but is not, and no folder of its name.
    """
    name = str(model)
    if name in names() or (name in TRAINABLE and not Path(name).is_dir()):
        return path(name)
    return Path(model).expanduser()


def card(name: str) -> dict[str, Any]:
    """The card of an embedded model or of a model's folder: what it is, data, licence, training, measured quality. Empty if it
    has none.

    Raises:
        ValueError: no such model, or its card is not a JSON object.
    """
    file = (Path(name) if name not in names() and Path(name).is_dir() else path(name)) / "card.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The card {file} is not JSON ({error}). Repair or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The card {file} is not a JSON object. Repair or remove it.")
    return content


def size(name: str) -> int:
    """Bytes on disk of an embedded model."""
    return sum(p.stat().st_size for p in path(name).rglob("*") if p.is_file())
