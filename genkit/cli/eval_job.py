"""Carries out what `genkit eval` was asked: samples, reads features on all processes, compares them on the first."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit.cli.common import Output, resolve_device
from genkit.cli.eval import DISTANCES
from genkit.data.source import ImageSource, digit_source, open_source
from genkit.metrics.attributes import asked_for, attribute_accuracy
from genkit.metrics.backbones import Backbone, load_backbone
from genkit.metrics.estimate import Estimate, bootstrap_mean
from genkit.metrics.evaluation import evaluate, impossible, shortage
from genkit.metrics.reading import forget, read, read_features
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from genkit.sweep import Plan


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images that are measured, the text that each was made from, and what it should show (empty if that is not known)."""

    source: ImageSource
    texts: list[str | None]
    asked: list[dict[str, int]]


class Job:
    """A run of `genkit eval`.

    Args:
        plan: the options by name.
        resume: take features of the images that are kept already; those of the reference always are.

    Attributes:
        document: what `--json` prints, after `run`.
    """

    def __init__(self, plan: dict[str, Any], ranks: Ranks, output: Output, *, resume: bool) -> None:
        self.plan, self.ranks, self.output, self.resume = plan, ranks, output, resume
        self.document: dict[str, Any] = {}
        self._kept: list[str] = []  # identities under which features of the sample are kept

    def run(self, table: Plan | None, *, device: str, attn: str, batch_size: int, allow_pickle: bool) -> None:
        """Sample if there is a table, read features, compare.

        Raises:
            ValueError: nothing to measure, images that cannot be read or made, a metric that so few images do not have.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        began = time.perf_counter()
        device = self.ranks.join(cpu=device == "cpu") or resolve_device(device)
        plan = self.plan
        if table is not None:
            made = self._sample(table, device, attn, batch_size, allow_pickle)
            sample = open_sample(plan["folder"], only=made)
        else:
            sample = open_sample(plan["folder"], count=plan["count"], seed=plan["seed"])
        size = len(sample.source)
        reference = None if plan["reference"] is None else open_reference(plan["reference"], size)
        metrics = self._metrics(sample, reference)
        found, told = self._measure(metrics, sample, reference, device)
        self.document = {
            "folder": plan["folder"], "images": size, **told, "metrics": {name: dataclasses.asdict(e) for name, e in found.items()},
            "warnings": self._warnings(metrics, size, reference, told), "seconds": time.perf_counter() - began,
        }  # fmt: skip
        self.ranks.wait()
        if self.ranks.leads:
            for warning in self.document["warnings"]:
                self.output.note(f"Warning: {warning}")
            for identity in self._kept:
                forget(identity, sample.source)

    def _sample(self, table: Plan, device: str, attn: str, batch_size: int, allow_pickle: bool) -> set[str]:
        """Names of the files of the table's images, all of them made."""
        from genkit.cli import job
        from genkit.gallery import Gallery
        from genkit.runner import NOTHING

        gallery = Gallery(Path(self.plan["folder"]))
        done = {recipe for recipe in table.recipes if self.resume and gallery.has(recipe)}
        self.ranks.wait()
        sampling = job.Job(table, gallery, done, self.ranks, self.output, NOTHING)
        sampling.make(device, attn, batch_size, allow_pickle)
        errors = [error for part in self.ranks.gather([list(sampling.errors.values())]) for error in part]
        if errors:
            raise ValueError(f"{len(errors)} of {len(table.recipes)} images could not be made: {errors[0]}")
        return {gallery.path(recipe).name for recipe in table.recipes}

    def _metrics(self, sample: Sample, reference: ImageSource | None) -> list[str]:
        """What is measured: what was asked for, or all that can be."""
        wanted, size = self.plan["metrics"], len(sample.source)
        reasons = {} if reference is None else {m: impossible(m, size, len(reference), self.plan["k"]) for m in DISTANCES}
        if wanted is not None:
            for metric in wanted:
                if reasons.get(metric) is not None:
                    raise ValueError(reasons[metric])
            if "accuracy" in wanted and not any(sample.asked):
                raise ValueError(
                    "accuracy needs to know what each image should show, and no recipe, caption or folder says a digit or a colour."
                )
            if "clip" in wanted and not all(sample.texts):
                raise ValueError("clip needs a text for each image: from recipes, NAME.txt beside the images, or metadata.jsonl.")
            return list(wanted)
        found = [metric for metric, reason in reasons.items() if reason is None]
        found += ["accuracy"] * any(sample.asked) + ["clip"] * (self.plan["clip"] is not None and all(sample.texts))
        if not found:
            why = next((reason for reason in reasons.values() if reason), "Give --reference DIR, FILE.npz or digits.")
            raise ValueError(f"There is nothing to measure {size} image{'s' * (size > 1)} by. {why}")
        return found

    def _measure(
        self, metrics: Sequence[str], sample: Sample, reference: ImageSource | None, device: str
    ) -> tuple[dict[str, Estimate], dict[str, Any]]:
        """The figures, and what is to be told of how they were found."""
        distances = [metric for metric in metrics if metric in DISTANCES]
        replicates, seed = self.plan["bootstrap"], self.plan["seed"]
        found: dict[str, Estimate] = {}
        told: dict[str, Any] = {"reference": None, "features": None, "resized": None}
        if distances:
            assert reference is not None
            backbone = load_backbone(self.plan["features"], device)
            told = {
                "reference": {"name": self.plan["reference"], "images": len(reference)},
                "features": {"name": self.plan["features"], "dimensions": backbone.dimensions, "size": list(backbone.size)},
                "resized": {"images": _others(sample.source, backbone.size), "reference": _others(reference, backbone.size)},
            }
            self._say_resized(told["resized"], backbone.size)
            theirs = self._read(backbone, reference, "reference")
            ours = self._read(backbone, sample.source, "images", keep=False)
            if self.ranks.leads:  # the others have the same features, and nothing to do
                found |= evaluate(ours, theirs, distances, replicates=replicates, seed=seed, k=self.plan["k"])
        if "accuracy" in metrics:
            judge = load_backbone("judge", device)
            found |= attribute_accuracy(judge.network, self._read(judge, sample.source, "judging", keep=False), sample.asked)
        if "clip" in metrics:
            found["clip"] = bootstrap_mean(self._clip(sample, device), replicates=replicates, seed=seed)
        return found, told

    def _read(self, backbone: Backbone, source: ImageSource, what: str, *, keep: bool = True) -> Tensor:
        """Features; those of the reference are kept for other runs, those of the sample until this one ends."""
        from genkit.console import progress

        # What this very run has read already (the judge's features, for distances and then for the accuracy) is there anyway.
        identity = backbone.identity()
        reuse = keep or self.resume or identity in self._kept
        if not keep:
            self._kept.append(identity)
        with progress(disable=not self.ranks.leads) as bar:
            task = bar.add_task(what, total=-(-len(source) // self.ranks.world))
            return read_features(backbone, source, reuse=reuse, ranks=self.ranks, progress=lambda rows: bar.advance(task, rows))

    def _clip(self, sample: Sample, device: str) -> Tensor:
        """CLIP score (N,) of each image and its text."""
        from genkit.metrics.clip import clip_score, load_clip

        network, tokenizer = load_clip(self.plan["clip"], device)
        config: Any = network.config
        side: int = config.vision_config.image_size
        texts = [text or "" for text in sample.texts]

        def run(rows: Sequence[int]) -> Tensor:
            return clip_score(sample.source.images(rows, (side, side)), [texts[row] for row in rows], network, tokenizer)

        weights = Backbone("clip", network, lambda x: x, (side, side), 1).identity()
        identity = hashlib.sha256("\n".join([weights, *texts]).encode()).hexdigest()
        self._kept.append(identity)
        return read(run, identity, sample.source, reuse=self.resume, ranks=self.ranks)

    def _warnings(self, metrics: Sequence[str], size: int, reference: ImageSource | None, told: dict[str, Any]) -> list[str]:
        if reference is None or told["features"] is None:
            return []
        found = shortage(metrics, size, len(reference), told["features"]["dimensions"], self.plan["k"])
        if self.plan["metrics"] is None:
            left_out = [impossible(m, size, len(reference), self.plan["k"]) for m in DISTANCES if m not in metrics]
            found += [reason for reason in left_out if reason is not None]
        return found

    def _say_resized(self, resized: dict[str, int], size: tuple[int, int]) -> None:
        for what, number in resized.items():
            if number:
                self.output.note(
                    f"{number} images of the {'sample' if what == 'images' else what} are not {size[1]} x {size[0]}: they are "
                    "scaled until they cover it (bicubic, antialiased), and cut to their centre."
                )

    def rich(self) -> Any:
        """The table for people, and the summary."""
        from rich import table
        from rich.console import Group
        from rich.markup import escape

        grid = table.Table("metric", box=None)
        for name in ("value", "95 % interval", "of"):
            grid.add_column(name, justify="right")
        for name, row in self.document["metrics"].items():
            grid.add_row(name, f"{row['value']:.4g}", f"{row['low']:.4g} to {row['high']:.4g}", f"{row['count']:,}")
        lines = [f"{self.document['images']:,} images of {self.document['folder']}"]
        if (reference := self.document["reference"]) is not None:
            features = self.document["features"]
            by = f"{features['dimensions']} features of {features['name']}"
            lines[0] += f" against {reference['images']:,} of {reference['name']}, by {by}"
        return Group(grid, escape(lines[0] + f" ({self.document['seconds']:.0f} s)."))


def open_sample(folder: str, *, count: int | None = None, seed: int = 0, only: set[str] | None = None) -> Sample:
    """The images of a folder or an .npz.

    Of a folder of `genkit sample` the contact sheet and the heat maps are left out. What an image should show is said by its
    recipe, its caption or its label.

    Args:
        count: so many of them, a random choice of `seed`.
        only: names of files in the folder; the others are left out.

    Raises:
        ValueError, FileNotFoundError: no images, or fewer than `count`.
    """
    path = Path(folder)
    source = open_source(path)
    names = source.names or []
    recipes = [_recipe(path / name) for name in names] if path.is_dir() else [None] * len(source)
    rows = list(range(len(source)))
    if only is not None:
        rows = [row for row in rows if names[row] in only]
    if count is not None and count > len(rows):
        raise ValueError(f"{folder!r} has {len(rows)} images, fewer than --count {count}.")
    if count is not None:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        rows = [rows[i] for i in sorted(chosen.tolist())]
    texts: list[str | None] = []
    labels: list[str | int | None] = []
    for row in rows:
        recipe = recipes[row]
        texts.append(source.captions[row] if recipe is None and source.captions is not None else getattr(recipe, "prompt", None))
        labels.append(source.labels[row] if recipe is None and source.labels is not None else getattr(recipe, "label", None))
    return Sample(source.subset(rows), texts, [asked_for(*each) for each in zip(texts, labels, strict=True)])


def open_reference(name: str, size: int) -> ImageSource:
    """The images to compare `size` images with.

    "digits" are the 1,000 held-out real digits, in new colours for every further thousand of `size`; "digits-train" as many of the
    4,000 training digits as genkit trains on.

    Raises:
        ValueError: no folder, .npz or data of that name, or no images in it.
    """
    if name == "digits":
        from genkit.zoo.quality import held_out

        truth = held_out(1000 * -(-size // 1000))
        return digit_source(name, "test", truth, truth.captions())
    if name == "digits-train":
        return open_source("digits")
    if not Path(name).exists():
        raise ValueError(f"There is no reference {name!r}. Give a folder of images, FILE.npz, digits or digits-train.")
    if Path(name).is_file() and Path(name).suffix != ".npz":
        raise ValueError(f"The reference {name!r} is a file, but no .npz. Give a folder of images, FILE.npz or digits.")
    return open_source(name)


def _recipe(file: Path) -> Any:
    """The recipe that an image carries, or None."""
    from genkit.recipe import read_recipe

    if file.suffix.lower() == ".png":
        with suppress(ValueError, OSError):
            return read_recipe(file)
    return None


def _others(source: ImageSource, size: tuple[int, int]) -> int:
    """How many images have another size."""
    return sum(source.sizes(row) != size for row in range(len(source))) if source.sizes is not None else 0
