"""Carries out what `genkit sample` planned: makes the images, waits for other processes, draws the sheet, reports."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from genkit.cli.common import BAD_INPUT, INTERRUPTED, PARTLY, Output, resolve_device
from genkit.gallery import SHEET_MOST, Gallery
from genkit.ranks import Ranks
from genkit.recipe import Recipe
from genkit.runner import Watch
from genkit.sweep import Plan


class Job:
    """A run of a plan: this process's share of the images, the contact sheet, the report.

    Args:
        done: recipes whose images are kept.
        watch: what to record of attention.
    """

    def __init__(self, table: Plan, gallery: Gallery, done: set[Recipe], ranks: Ranks, output: Output, watch: Watch) -> None:
        self.table, self.gallery, self.done, self.ranks, self.output = table, gallery, done, ranks, output
        self.watch = watch
        self.seconds: dict[Recipe, float] = {}
        self.errors: dict[Recipe, str] = {}
        self.began = time.perf_counter()

    def run(
        self, *, device: str, attn: str = "auto", batch_size: int, allow_pickle: bool, grid: bool, tokens: Sequence[Path]
    ) -> None:
        """Make what is missing, wait for the other processes, report.

        Raises:
            typer.Exit: some images failed, or the run was interrupted.
        """
        try:
            own = self.ranks.join(cpu=device == "cpu")
            self.make(own or device, attn, batch_size, allow_pickle, tokens)
            self.ranks.wait()
            sheet = self._sheet() if grid and self.ranks.leads and len(self.table.recipes) > 1 else None
        except KeyboardInterrupt:
            made = self._present()
            self.output.note(f"Interrupted after {len(made)} of {len(self.table.recipes)} images. Repeat with --resume to finish.")
            self.output.result({**self._document(made, None), "interrupted": True})
            raise typer.Exit(INTERRUPTED) from None
        finally:
            self.ranks.leave()
        self._report(sheet)

    def make(self, device: str, attn: str, batch_size: int, allow_pickle: bool, tokens: Sequence[Path] = ()) -> None:
        """This process's share of the images that are not there yet; what fails is in `errors`."""
        from genkit.attention import use_attention
        from genkit.console import progress
        from genkit.runner import load, run

        recipes = [recipe for recipe in self.ranks.share(self.table.recipes) if recipe not in self.done]
        if not recipes:
            return
        first = recipes[0]
        with progress(disable=not self.ranks.leads) as bar, ExitStack() as stack:
            task = bar.add_task(f"loading {Path(first.model).name}", total=len(recipes))
            device = resolve_device(device)
            pipe = load(
                first.model,
                dtype=first.dtype,
                device=device,
                tokens=tokens,
                allow_pickle=allow_pickle,
                quiet=self.output.quiet,
            )
            stack.enter_context(use_attention(pipe, attn))
            bar.update(task, description="sampling")

            def advance(images: float) -> None:
                bar.advance(task, images)

            outcomes = run(pipe, recipes, batch_size=batch_size, progress=advance, watch=self.watch)
            for count, outcome in enumerate(outcomes, 1):
                if outcome.error is None:
                    self.gallery.save(outcome, device=device)
                    self.seconds[outcome.recipe] = outcome.seconds
                else:
                    self.errors[outcome.recipe] = outcome.error
                bar.update(task, completed=max(count, bar.tasks[task].completed))

    def _sheet(self) -> Path | None:
        """The contact sheet; very many images have none."""
        if (count := len(self.table.recipes)) > SHEET_MOST:
            self.output.note(f"No contact sheet: it would show {count:,} images, and holds at most {SHEET_MOST:,}.")
            return None
        return self.gallery.save_sheet(self.table)

    def _present(self) -> list[Recipe]:
        return [recipe for recipe in self.table.recipes if recipe in self.done or recipe in self.seconds or self._by_others(recipe)]

    def _by_others(self, recipe: Recipe) -> bool:
        return self.ranks.world > 1 and recipe not in self.errors and self.gallery.has(recipe)

    def _document(self, made: list[Recipe], sheet: Path | None) -> dict[str, Any]:
        images = [
            {
                "file": str(self.gallery.path(recipe)),
                "prompt": recipe.prompt,
                "seed": recipe.seed,
                "seconds": self.seconds.get(recipe),
                "resumed": recipe in self.done,
                "heatmaps": str(self.gallery.heatmaps(recipe)) if self.watch.heatmaps else None,
                "recipe": recipe.to_dict(),
            }
            for recipe in made
        ]
        present = set(made)
        failed = [
            {"file": str(self.gallery.path(r)), "error": self.errors.get(r, "not made"), "recipe": r.to_dict()}
            for r in self.table.recipes
            if r not in present
        ]
        return {
            "images": images,
            "failed": failed,
            "grid": None if sheet is None else str(sheet),
            "seconds": time.perf_counter() - self.began,
        }

    def _report(self, sheet: Path | None) -> None:
        made = self._present()
        failed = len(self.table.recipes) - len(made)
        if self.ranks.leads:
            for error in dict.fromkeys(self.errors.values()):
                typer.echo(f"Error: {error}", err=True)
            kept = f" ({len(self.done)} were there already)" if self.done else ""
            where = f", contact sheet {sheet}" if sheet is not None else ""
            text = f"{len(made)} of {len(self.table.recipes)} images in {self.gallery.folder}{kept}{where}."
            self.output.result(self._document(made, sheet), text)
        if failed:
            raise typer.Exit(PARTLY if made else BAD_INPUT)
