"""Training a probe: features to disk, a head on them by the common loop or the linear solver, a folder that reads images again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.data.source import ImageSource
from genkit.denoisers import Denoiser
from genkit.features.cache import FeatureCache
from genkit.features.heads import AttentionHead, FeedbackHead, LinearHead
from genkit.features.linear import fit_linear_probe
from genkit.features.probe import Probe, ProbeConfig, classes_of, extractor_of, targets_of, two_passes
from genkit.features.taps import mirrors_of
from genkit.ranks import Ranks
from genkit.training import fit


def train_probe(
    denoiser: Denoiser,
    source: ImageSource,
    folder: str | Path,
    config: ProbeConfig,
    *,
    resume: bool = False,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Probe, dict[str, float]]:
    """Train a head on a labelled source, and save it to `folder`.

    Features are kept in `folder`/features (the feedback head has none to keep), log and checkpoint in `folder`/training.

    Args:
        resume: go on with the features and the checkpoint that are there.
        batch_size: images at a time.
        ranks: processes that share the work, after `Ranks.join`.
        progress: called with the number of rows whose features are there since the last call.

    Returns:
        The probe, and figures on images that it was not trained on: cross-validated `accuracy` and `loss` of the linear head, those
        on the part held out of another; `images`, the number of labelled ones.

    Raises:
        ValueError: no labels, one class only, too few images of a class, or features in the folder that were made otherwise.
    """
    folder, ranks = Path(folder), ranks or Ranks()
    labels = classes_of(source)
    if config.labels_per_class is not None:
        source = source.subset(_chosen(source, labels, config.labels_per_class, config.seed))
    targets = targets_of(source, labels)
    if config.head == "feedback":
        head, figures = _train_feedback(denoiser, source, targets, folder, config, len(labels), resume, batch_size, ranks)
    else:
        extractor = extractor_of(denoiser, config)
        cache = FeatureCache.build(
            extractor, source, folder / "features", dtype="float32", batch_size=batch_size, resume=resume, ranks=ranks,
            progress=progress,
        )  # fmt: skip
        if config.head == "linear":
            head, figures = _train_linear(cache, targets, config, len(labels))
        else:
            head, figures = _train_attention(cache, targets, folder, config, len(labels), denoiser, resume, ranks)
    probe = Probe(head, denoiser, config, labels)
    if ranks.leads:
        probe.save(folder)
    return probe, {**figures, "images": len(source)}


def _chosen(source: ImageSource, labels: Sequence[str | int], count: int, seed: int) -> list[int]:
    """`count` rows of each class, of different pictures."""
    targets = targets_of(source, labels)
    rows = []
    for i, label in enumerate(labels):
        pictures = {source.groups[row]: row for row in reversed(torch.nonzero(targets == i).flatten().tolist())}
        own = sorted(pictures.values())
        if len(own) < count:
            raise ValueError(f"The class {label!r} has {len(own)} images, but {count} of each class are wanted. Ask for fewer.")
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed * 1009 + i))
        rows += [own[j] for j in order[:count].tolist()]
    return sorted(rows)


def _train_linear(cache: FeatureCache, targets: Tensor, config: ProbeConfig, count: int) -> tuple[LinearHead, dict[str, float]]:
    head = LinearHead(cache.shapes, count, len(config.t), config.pool)
    vectors = head.flatten(cache.features())
    weight, bias, figures = fit_linear_probe(vectors, targets, count, groups=torch.tensor(cache.groups), folds=config.folds)
    head.load_state_dict({"fc.weight": weight, "fc.bias": bias})
    return head, figures


def _train_attention(
    cache: FeatureCache,
    targets: Tensor,
    folder: Path,
    config: ProbeConfig,
    count: int,
    denoiser: Denoiser,
    resume: bool,
    ranks: Ranks,
) -> tuple[AttentionHead, dict[str, float]]:
    torch.manual_seed(config.train.seed)
    head = AttentionHead(cache.shapes, count, len(config.t), config.width, config.num_heads, config.depth)
    draws = 1 if config.noise == "fixed" else config.noise

    def logits(head: Any, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        # In training another draw of the noise each time, which augments; their mean otherwise.
        draw = None if generator is None else int(torch.randint(draws, (1,), generator=generator))
        return head({name: value.to(denoiser.device) for name, value in cache.features(rows.tolist(), draw).items()})

    return _fit(head, logits, targets, torch.tensor(cache.groups), folder, config, denoiser, resume, ranks)


def _train_feedback(
    denoiser: Denoiser, source: ImageSource, targets: Tensor, folder: Path, config: ProbeConfig, count: int, resume: bool,
    batch_size: int, ranks: Ranks,
) -> tuple[FeedbackHead, dict[str, float]]:  # fmt: skip
    pairs = mirrors_of(denoiser.network)
    extractor, first = extractor_of(denoiser, config), extractor_of(denoiser, config, list(pairs))
    channels = {info.name: info.channels for info in extractor_of(denoiser, config, [*pairs, *pairs.values()]).feature_info}
    shapes = {info.name: info.shape for info in extractor.feature_info}
    torch.manual_seed(config.train.seed)
    widths = {a: (channels[a], channels[b]) for a, b in pairs.items()}
    head = FeedbackHead(pairs, widths, shapes, count, config.width, config.num_heads, config.depth)
    batches = [range(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)]
    with torch.no_grad():
        latents = torch.cat([extractor.encode(source.images(rows, extractor.size)).cpu() for rows in batches])

    def logits(head: Any, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        return two_passes(head, first, extractor, latents[rows].to(denoiser.device))

    return _fit(head, logits, targets, torch.tensor(source.groups), folder, config, denoiser, resume, ranks)


def _fit(
    head: Any, logits: Callable[[Any, Tensor, torch.Generator | None], Tensor], targets: Tensor, groups: Tensor, folder: Path,
    config: ProbeConfig, denoiser: Denoiser, resume: bool, ranks: Ranks,
) -> tuple[Any, dict[str, float]]:  # fmt: skip
    """Train a head by the common loop; by picture, not by row, some are held out."""
    held = _held_out(targets, groups, config.held_out, config.train.seed)
    rows, held_rows = torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()

    def loss(head: Any, generator: torch.Generator, step: int) -> Tensor:
        chosen = rows[torch.randint(len(rows), (config.train.batch_size,), generator=generator)]
        return F.cross_entropy(logits(head, chosen, generator).float(), targets[chosen].to(denoiser.device))

    def validate(head: Any) -> dict[str, float]:
        found = torch.cat([logits(head, part, None).float().cpu() for part in held_rows.split(config.train.batch_size)])
        wanted = targets[held_rows]
        return {
            "loss": F.cross_entropy(found, wanted).item(),
            "accuracy": (found.argmax(1) == wanted).float().mean().item(),
        }

    work = folder / "training"
    best = fit(
        head, loss, config.train, work, name="probe", resume=resume, device=str(denoiser.device), validate=validate, ranks=ranks
    )
    with torch.no_grad():
        return best, validate(best)


def _held_out(targets: Tensor, groups: Tensor, fraction: float, seed: int) -> Tensor:
    """Which rows (N,) are held out: about that fraction of the pictures of each class, at least one."""
    held = torch.zeros(len(targets), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in targets.unique():
        own = groups[targets == label].unique()
        if len(own) < 2:
            raise ValueError("A class has one image only, which leaves nothing to validate with. Give at least two.")
        count = min(len(own) - 1, max(1, round(fraction * len(own))))
        chosen = own[torch.randperm(len(own), generator=generator)[:count]]
        held |= (targets == label) & torch.isin(groups, chosen)
    return held
