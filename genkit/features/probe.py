"""Probes: a trained head on frozen features, saved with what it needs to read images again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genkit import zoo
from genkit.checkpoints import check_folder
from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.errors import unknown
from genkit.features.extractor import FeatureExtractor
from genkit.features.heads import AttentionHead, FeedbackHead, LinearHead
from genkit.files import write_atomic
from genkit.guidance.origin import origin, require_same
from genkit.training import TrainConfig

HEADS = {"linear": LinearHead, "attention": AttentionHead, "fusion": AttentionHead, "feedback": FeedbackHead}
RECORD = "probe.json"
TRAIN = TrainConfig(steps=2000, batch_size=128, lr=1e-3, weight_decay=0.05, patience=10, bf16=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a probe reads, and how it is trained.

    Args:
        taps, t, noise, seed: of the `FeatureExtractor`.
        head: "linear"; "attention" on one block and time; "fusion" of several (DifFormer); "feedback" (DifFeed), which runs the
            network twice.
        pool: linear: steps along a side that maps are averaged to; 2 in the paper.
        width, num_heads, depth: of the other heads' transformer; 1024, 8 and 2 in the paper, for 1024 channels and 1000 classes.
        labels_per_class: so many labelled images of each class, chosen by the seed; None takes all.
        folds: linear: of the cross-validation that chooses the penalty.
        held_out: the other heads: fraction of the images that stops the training.
        train: the other heads: the loop. (The paper has plain SGD for 28 epochs.)

    Raises:
        ValueError: an unknown head, taps or times that it does not take, or a number out of range.
    """

    taps: tuple[str | int, ...]
    t: tuple[int, ...] = (150,)
    noise: Literal["fixed"] | int = "fixed"
    seed: int = 0
    head: str = "linear"
    pool: int = 2
    width: int = 128
    num_heads: int = 4
    depth: int = 2
    labels_per_class: int | None = None
    folds: int = 5
    held_out: float = 0.2
    train: TrainConfig = dataclasses.field(default_factory=lambda: TRAIN)

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise unknown("head", self.head, HEADS)
        if not self.taps or not self.t:
            raise ValueError("A probe reads at least one tap at one t. Give both.")
        if not all(isinstance(tap, (str, int)) for tap in self.taps):
            raise ValueError(f"taps={self.taps!r:.80} must be names or numbers of blocks.")
        for name in ("seed", "pool", "width", "num_heads", "depth", "folds"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r:.80} must be a whole number.")
        if not all(isinstance(t, int) for t in self.t):
            raise ValueError(f"t={self.t!r:.80} must be timesteps, whole numbers.")
        if self.head in ("attention", "feedback") and (len(self.taps), len(self.t)) != (1, 1):
            raise ValueError(f"The {self.head} head takes one tap and one t, got {len(self.taps)} and {len(self.t)}. Use fusion.")
        if self.head == "fusion" and len(self.taps) * len(self.t) < 2:
            raise ValueError("The fusion head takes several taps or several t. Use attention for one.")
        if self.labels_per_class is not None and self.labels_per_class < 2:
            raise ValueError(f"labels_per_class={self.labels_per_class} must be at least 2: one to train with, one to validate.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be a fraction between 0 and 1.")


class Probe:
    """A trained head and the extractor whose features it reads.

    Args:
        head: `LinearHead`, `AttentionHead` or `FeedbackHead`.
        denoiser: the model.
        config: how it was trained.
        labels: the class names, in the order of the logits.

    Example:
        >>> probe = Probe.load("runs/probe")
        >>> probe.predict(images)                  # ["seven", "two"], images (2, 3, H, W) in [-1, 1]
    """

    def __init__(self, head: Any, denoiser: Denoiser, config: ProbeConfig, labels: Sequence[str | int]) -> None:
        self.head, self.config, self.labels = head.to(denoiser.device).eval(), config, list(labels)
        self.extractor = extractor_of(denoiser, config)
        self._first = extractor_of(denoiser, config, list(head.config.pairs)) if isinstance(head, FeedbackHead) else None

    @torch.no_grad()
    def logits(self, images: Tensor | None = None, *, latents: Tensor | None = None) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W) in [-1, 1], or of clean samples (B, c, h, w)."""
        if self._first is None:
            return self.head(self.extractor(images, latents=latents))
        x0 = self.extractor.encode(images) if images is not None else latents
        return two_passes(self.head, self._first, self.extractor, x0)

    def predict(self, images: Tensor) -> list[str | int]:
        """The class of each image."""
        return [self.labels[i] for i in self.logits(images).argmax(1).tolist()]

    def accuracy(self, source: ImageSource, batch_size: int = 64) -> float:
        """Share of a labelled source that is read right; a label that the probe does not know is an error.

        Raises:
            ValueError: a source without labels, or with others than the probe's.
        """
        targets = targets_of(source, self.labels)
        hits = 0
        for start in range(0, len(source), batch_size):
            rows = range(start, min(start + batch_size, len(source)))
            found = self.logits(source.images(rows, self.extractor.size)).argmax(1).cpu()
            hits += int((found == targets[start : start + batch_size]).sum())
        return hits / len(source)

    def save(self, folder: str | Path) -> None:
        """Write head (config.json, safetensors) and probe.json."""
        self.head.save_pretrained(folder)
        config = dataclasses.asdict(self.config)
        record = {"model": origin(self.extractor.denoiser.pipe), "labels": self.labels, "config": config}
        write_atomic(Path(folder) / RECORD, json.dumps(record, indent=2).encode())

    @classmethod
    def load(cls, folder: str | Path, denoiser: Denoiser | None = None) -> Probe:
        """Read a probe that was saved.

        Args:
            denoiser: the model; by default the embedded one that it was trained on. Other models are never loaded on a file's word.

        Raises:
            FileNotFoundError: the folder holds no probe.
            ValueError: a damaged probe, another model than the one it was trained on (names both), or none where it is needed.
        """
        folder = Path(folder)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no probe: {RECORD} is missing.")
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            values = record["config"]
            train = TrainConfig(**values.pop("train"))
            taps, times = tuple(values.pop("taps")), tuple(values.pop("t"))
            config = ProbeConfig(**values, taps=taps, t=times, train=train)
            name, labels = record["model"]["name"], record["labels"]
            if not isinstance(labels, list) or not all(isinstance(label, (str, int)) for label in labels):
                raise TypeError("labels must be a list of names or numbers")
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{str(folder / RECORD)!r} is damaged ({error}). Train the probe again.") from error
        if denoiser is None:
            if name not in zoo.names():
                raise ValueError(
                    f"The probe reads features of {name!r}, which is not embedded. Give it: Probe.load(folder, denoiser)."
                )
            from genkit.pipelines import GuidedPipeline

            denoiser = GuidedPipeline.from_pretrained(name).denoiser
        require_same(record["model"], denoiser.pipe, "probe", train="probe")
        check_folder(folder)
        head = HEADS[config.head].from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        return cls(head, denoiser, config, labels)


def classes_of(source: ImageSource) -> list[str | int]:
    """The class names of a source, sorted.

    Raises:
        ValueError: no labels, or one class only.
    """
    if source.labels is None:
        raise ValueError(f"{source.name!r} has no labels. Put the images of each class in a folder of its own.")
    found = set(source.labels)
    if len(found) < 2:
        raise ValueError(
            f"{source.name!r} has one class only, {next(iter(found))!r}. A probe tells classes apart: give two or more."
        )
    return sorted(found, key=str)


def targets_of(source: ImageSource, labels: Sequence[str | int]) -> Tensor:
    """The number (N,) of each row's class among `labels`.

    Raises:
        ValueError: a source without labels, or one that is not among them.
    """
    if source.labels is None:
        raise ValueError(f"{source.name!r} has no labels. Put the images of each class in a folder of its own.")
    number = {label: i for i, label in enumerate(labels)}
    strange = [label for label in source.labels if label not in number]
    if strange:
        raise unknown("class", str(strange[0]), map(str, labels))
    return torch.tensor([number[label] for label in source.labels])


def extractor_of(denoiser: Denoiser, config: ProbeConfig, taps: Sequence[str | int] | None = None) -> FeatureExtractor:
    """The extractor of a probe, for its own taps or others."""
    t = config.t if len(config.t) > 1 else config.t[0]
    pool = config.pool if config.head == "linear" else None
    return FeatureExtractor(denoiser, config.taps if taps is None else taps, t=t, noise=config.noise, pool=pool, seed=config.seed)


def two_passes(head: Any, first: FeatureExtractor, extractor: FeatureExtractor, x0: Any) -> Tensor:
    """Logits (B, K) of a `FeedbackHead` for clean samples x0 (B, c, h, w); the graph, if any, begins at the feedback."""
    return head(first(latents=x0), lambda fed: extractor(latents=x0, inject=fed, grad=torch.is_grad_enabled()))
