"""A folder of generated images: PNGs that carry their recipes, side-car JSON, a contact sheet, and what is still missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.files import prepare_folder, write_atomic
from genkit.images import contact_sheet, save_png
from genkit.recipe import CHUNK, Recipe, versions

if TYPE_CHECKING:
    from genkit.runner import Outcome
    from genkit.sweep import Plan

SHEET = "grid.png"


class Gallery:
    """Images in one folder, a PNG and a JSON of the same name for each recipe.

    Args:
        folder: created if needed.

    Raises:
        OSError: the folder is a file, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._versions = versions()
        prepare_folder(folder)

    def path(self, recipe: Recipe) -> Path:
        """Where the recipe's PNG goes."""
        return self.folder / f"{recipe.name}.png"

    def has(self, recipe: Recipe) -> bool:
        """Whether the recipe's image and its side-car are there and belong to this very recipe."""
        sidecar = self.path(recipe).with_suffix(".json")
        try:
            # The side-car is written last, so it vouches for the image.
            content = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("hash") == recipe.hash and self.path(recipe).is_file()

    def save(self, outcome: Outcome, *, device: str) -> Path:
        """Write a successful outcome: the PNG, then its side-car, each whole or not at all.

        Returns:
            The path of the PNG.

        Raises:
            ValueError: the outcome has no image.
            OSError: the disk is full, or the folder has gone.
        """
        recipe, image = outcome.recipe, outcome.image
        if image is None:
            raise ValueError(f"There is no image of {recipe.name!r}: {outcome.error}")
        path = self.path(recipe)
        line = recipe.parameters(image.size, self._versions)
        save_png(image, path, {CHUNK: recipe.to_json(self._versions, outcome.attention), "parameters": line})
        sidecar: dict[str, Any] = {
            "recipe": recipe.to_dict(),
            "hash": recipe.hash,
            "versions": self._versions,
            "size": list(image.size),
            "scheduler": outcome.scheduler,
            "device": device,
            "dtype": recipe.dtype,
            "attention": outcome.attention,
            "seconds": round(outcome.seconds, 4),
        }
        write_atomic(path.with_suffix(".json"), json.dumps(sidecar, indent=2).encode())
        return path

    def save_sheet(self, plan: Plan) -> Path:
        """Draw the contact sheet of a plan from the images that are there.

        Returns:
            Its path, `grid.png`.
        """
        from PIL import Image

        def load(recipe: Recipe) -> Image.Image | None:
            if not self.has(recipe):
                return None
            with Image.open(self.path(recipe)) as image:
                return image.convert("RGB")

        width = len(plan.columns)
        images = [load(recipe) for recipe in plan.recipes]
        rows = [images[start : start + width] for start in range(0, len(images), width)]
        path = self.folder / SHEET
        save_png(contact_sheet(rows, plan.rows, plan.columns, plan.title), path)
        return path
