"""A folder of generated images: PNGs that carry their recipes, side-car JSON, a contact sheet, and what is still missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.files import prepare_folder, write_atomic
from genkit.images import contact_sheet, save_png
from genkit.recipe import CHUNK, Recipe, versions

if TYPE_CHECKING:
    from PIL.Image import Image

    from genkit.attention import ImageMaps
    from genkit.runner import Outcome, Watch
    from genkit.sweep import Plan

SHEET = "grid.png"
SHEET_MOST = 1024  # pictures of a contact sheet
HEATMAPS = "heatmaps"  # a folder of their own, so that the pictures are the only ones in theirs
ENTROPY = "attention_entropy"


class Gallery:
    """Images in one folder, a PNG and a JSON of the same name for each recipe.

    Args:
        folder: created if needed.
        shards: spread the images, and their heat maps, over 256 folders each, by the first two digits of their recipe's hash, since
            a folder of very many files is slow. Which one does not depend on what else is made.

    Raises:
        OSError: the folder is a file, or cannot be written.
    """

    def __init__(self, folder: Path, *, shards: bool = False) -> None:
        self.folder, self.shards = folder, shards
        self._versions = versions()
        prepare_folder(folder)

    def path(self, recipe: Recipe) -> Path:
        """Where the recipe's PNG goes."""
        return self._place(self.folder, recipe)

    def heatmaps(self, recipe: Recipe) -> Path:
        """Where the recipe's heat maps go: this sheet, and beside it the arrays (.npz)."""
        return self._place(self.folder / HEATMAPS, recipe)

    def _place(self, folder: Path, recipe: Recipe) -> Path:
        return (folder / recipe.hash[:2] if self.shards else folder) / f"{recipe.name}.png"

    def has(self, recipe: Recipe, watch: Watch | None = None) -> bool:
        """Whether the recipe's image, its side-car and what was to be recorded are there, and belong to this very recipe."""
        sidecar = self.path(recipe).with_suffix(".json")
        try:
            # The side-car is written last, so it vouches for the image.
            content = json.loads(sidecar.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(content, dict) or content.get("hash") != recipe.hash or not self.path(recipe).is_file():
            return False
        maps = [self.heatmaps(recipe), self.heatmaps(recipe).with_suffix(".npz")] if watch is not None and watch.heatmaps else []
        return all(path.is_file() for path in maps) and (watch is None or not watch.entropy or ENTROPY in content)

    def save(self, outcome: Outcome, *, device: str) -> Path:
        """Write a successful outcome: what was recorded, the PNG, then its side-car, each whole or not at all.

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
        if outcome.heatmaps is not None:
            self._save_heatmaps(recipe, image, outcome.heatmaps)
        if self.shards:
            path.parent.mkdir(exist_ok=True)
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
        if outcome.entropy is not None:
            sidecar[ENTROPY] = outcome.entropy
        write_atomic(path.with_suffix(".json"), json.dumps(sidecar, indent=2).encode())
        return path

    def _save_heatmaps(self, recipe: Recipe, image: Image, maps: ImageMaps) -> None:
        from genkit.attention import overlay

        path = self.heatmaps(recipe)
        prepare_folder(path.parent)
        write_atomic(path.with_suffix(".npz"), overlay.as_npz(maps))
        save_png(overlay.sheet(image, maps), path)

    def save_sheet(self, plan: Plan) -> Path:
        """Draw the contact sheet of a plan from the images that are there.

        Returns:
            Its path, `grid.png`.
        """
        from PIL.Image import open as open_image

        def load(recipe: Recipe) -> Image | None:
            if not self.has(recipe):
                return None
            with open_image(self.path(recipe)) as image:
                return image.convert("RGB")

        width = len(plan.columns)
        images = [load(recipe) for recipe in plan.recipes]
        rows = [images[start : start + width] for start in range(0, len(images), width)]
        path = self.folder / SHEET
        save_png(contact_sheet(rows, plan.rows, plan.columns, plan.title), path)
        return path
