"""Trains a discriminator for discriminator guidance (Kim et al., ICML 2023, arXiv 2211.17091).

    min_d  E_sigma [ E_{x0 ~ data} -log d(x, sigma) + E_{x0 ~ model} -log(1 - d(x, sigma)) ],     x = x0 + sigma eps

with sigma log-uniform, and generated samples of the very model and sampler that it will correct. Samples and encoded real images
are kept in the run's folder, shard by shard, so an interrupted run goes on where it stopped and several processes share the work.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from genkit import noise, samplers
from genkit.console import progress
from genkit.data.source import ImageSource
from genkit.denoisers import Cond, Denoiser
from genkit.files import prepare_folder, write_atomic
from genkit.guidance.discriminator import Discriminator, bce, matching_loss
from genkit.guidance.networks import SIGMA_MAX, SIGMA_MIN, random_levels
from genkit.guidance.noisy_classifier import load_noisy_classifier
from genkit.guidance.origin import origin
from genkit.levels import Level
from genkit.pipelines import GuidedPipeline
from genkit.ranks import Ranks
from genkit.training import TrainConfig, fit

VALIDATION_RATIOS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # noise-to-signal ratios at which the validation loss is reported
SHARD = 200  # samples in a file of the cache
MATCHING = TrainConfig(steps=4500, batch_size=192, lr=4e-3, warmup=50, weight_decay=0.0, ema_decay=0.995, seed=52)
TRAIN = TrainConfig(steps=3500, batch_size=192, lr=1e-3, validate_every=100, patience=8, seed=51)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """How to train a discriminator.

    Args:
        count: generated samples, and as many real ones (50,000 in the paper).
        steps, sampler, guidance_scale, eta: how the model is sampled; as it will be when it is guided. Several `steps` share the
            samples.
        extractor: the frozen feature extractor: an embedded noisy classifier or its folder; None trains the head on the samples.
        head: arguments of the head's `NoisyEncoder`.
        conditional: whether the head sees the model's condition, where it has one.
        sigmas: noise-to-signal ratios between which levels are drawn, log-uniformly; the paper's by default.
        held_out: fraction of the real images, and of the generated ones, that validates.
        matching: the loop that first learns what goes with which condition, from real samples alone; a few small layers.
        train: the training loop. Early stopping is on the validation loss: more epochs hurt (spec of the released code).

    Raises:
        ValueError: a count too small to split, no steps, or a fraction outside 0 to 1.
    """

    count: int = 8000
    steps: tuple[int, ...] = (30,)
    sampler: str | None = None
    guidance_scale: float = 1.0
    eta: float = 0.0
    extractor: str | None = None
    head: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"block_out_channels": (64,), "layers_per_block": 1, "attention_head_dim": 32, "norm_num_groups": 8}
    )
    conditional: bool = True
    sigmas: tuple[float, float] = (SIGMA_MIN, SIGMA_MAX)
    held_out: float = 0.1
    matching: TrainConfig = dataclasses.field(default_factory=lambda: MATCHING)
    train: TrainConfig = dataclasses.field(default_factory=lambda: TRAIN)

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or self.count * self.held_out < 2 or self.count * (1 - self.held_out) < 2:
            raise ValueError(f"count={self.count} with held_out={self.held_out} leaves nothing to train or to validate with.")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps={self.steps} must name at least one positive number of sampling steps.")
        if not 0 < self.sigmas[0] < self.sigmas[1]:
            raise ValueError(f"sigmas={self.sigmas} is no interval of positive noise-to-signal ratios.")
        if self.sampler is not None:
            samplers.require(self.sampler)


def train_discriminator(
    pipe: GuidedPipeline,
    source: ImageSource,
    folder: Path,
    config: DiscriminatorConfig | None = None,
    *,
    resume: bool = False,
    batch_size: int = 100,
    ranks: Ranks | None = None,
) -> Discriminator:
    """Sample the model, train the discriminator and save it to `folder`.

    Args:
        pipe: the model to correct.
        source: real images, with captions or labels where the model is conditional.
        folder: for the result, and in `training/` the samples, the log (`log.jsonl`, validation loss by noise level) and the
            checkpoint.
        resume: use the samples and the checkpoint that are there.
        batch_size: samples drawn at a time.
        ranks: processes that share the work, after `Ranks.join`.

    Raises:
        ValueError: a source that does not fit the model, or samples in the folder that were made otherwise.
    """
    config, ranks = config or DiscriminatorConfig(), ranks or Ranks()
    work = folder / "training"
    prepare_folder(work)
    pool = _Pool(pipe, source, work / "samples", config, ranks)
    pool.require_same_settings(resume)
    ranks.wait()
    pool.fill(batch_size)
    ranks.wait()
    data = _Data(pool, config)
    model = _build(pipe, data, config)

    if model.match is not None:
        _learn_matching(model, data, config, work / "matching", resume, ranks)

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        return _loss(model, data.training, config.train.batch_size // 2 or 1, config.sigmas, generator, data.device)

    trained = fit(
        model, loss, config.train, work, name="discriminator", resume=resume, device=str(data.device), ranks=ranks,
        validate=lambda model: _validate(model, data),
    )  # fmt: skip
    if ranks.leads:
        trained.to("cpu", torch.float16).save_pretrained(folder)
    return trained.float()


@dataclasses.dataclass(frozen=True)
class _Half:
    """Real and generated clean samples (N, C, h, w), and their conditions (N, ...) or None."""

    real: Tensor
    fake: Tensor
    real_cond: Tensor | None
    fake_cond: Tensor | None


class _Pool:
    """The cache of real and generated samples: files of `SHARD` samples that are there whole or not at all."""

    def __init__(self, pipe: GuidedPipeline, source: ImageSource, folder: Path, config: DiscriminatorConfig, ranks: Ranks) -> None:
        self.pipe, self.source, self.folder, self.config, self.ranks = pipe, source, folder, config, ranks
        self.denoiser: Denoiser = pipe.denoiser
        shape = self.denoiser.latent_shape(None, None)
        self.size = (shape[1] * self.denoiser.factor, shape[2] * self.denoiser.factor)

    def require_same_settings(self, resume: bool) -> None:
        """Note how the samples are made, or refuse a folder whose samples were made otherwise; the first process does it."""
        if not self.ranks.leads:
            return
        config = self.config
        settings = {
            "model": origin(self.pipe.host), "data": self.source.name, "count": config.count, "steps": list(config.steps),
            "sampler": config.sampler, "guidance_scale": config.guidance_scale, "eta": config.eta,
        }  # fmt: skip
        file = self.folder / "settings.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            found = json.loads(file.read_text())
            changed = [key for key, value in settings.items() if found.get(key) != json.loads(json.dumps(value))]
            if not resume:
                raise ValueError(f"{str(self.folder)!r} already holds samples. Use --resume to go on with them, or another --out.")
            if changed:
                raise ValueError(f"The samples in {str(self.folder)!r} were made with another {changed[0]}. Use another --out.")
        else:
            write_atomic(file, json.dumps(settings).encode())

    def fill(self, batch_size: int) -> None:
        """Make the missing shards that are this process's."""
        starts = list(range(0, self.config.count, SHARD))
        mine = [(kind, start) for kind in ("real", "fake") for start in self.ranks.share(starts)]
        missing = [(kind, start) for kind, start in mine if not self._file(kind, start).exists()]
        with progress(disable=not self.ranks.leads) as bar:
            task = bar.add_task("samples", total=2 * self.config.count)
            bar.update(task, completed=(len(mine) - len(missing)) * SHARD)
            for kind, start in missing:
                rows = range(start, min(start + SHARD, self.config.count))
                parts = [self._make(kind, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
                write_atomic(self._file(kind, start), save({"samples": torch.cat(parts).cpu().contiguous()}))
                bar.update(task, advance=len(rows))

    def samples(self, kind: str) -> Tensor:
        """All real or generated clean samples (N, C, h, w).

        Raises:
            ValueError: a damaged file; names it.
        """
        files = [self._file(kind, start) for start in range(0, self.config.count, SHARD)]
        found = []
        for file in files:
            try:
                found.append(load_file(file)["samples"])
            except (SafetensorError, KeyError) as error:
                raise ValueError(
                    f"The samples {str(file)!r} are truncated or damaged ({error}). Remove the file and go on with --resume."
                ) from error
        return torch.cat(found)

    def _file(self, kind: str, start: int) -> Path:
        return self.folder / f"{kind}-{start:08d}.safetensors"

    @torch.no_grad()
    def _make(self, kind: str, rows: Sequence[int]) -> Tensor:
        if kind == "real":
            images = self.source.images(rows, self.size)
            return self.denoiser.encode(images.to(self.denoiser.device))
        config, own = self.config, self.pipe.scheduler
        steps = config.steps[(rows[0] // SHARD) % len(config.steps)]
        try:
            if config.sampler is not None:
                self.pipe.scheduler = samplers.build(config.sampler, own)
            self.pipe.host.set_progress_bar_config(disable=True)
            return self.pipe(
                **_inputs(self.source, rows), seeds=[noise.mix(row, noise.TRAINING) for row in rows], num_inference_steps=steps,
                guidance_scale=config.guidance_scale, eta=config.eta, output_type="latent",
            ).images  # fmt: skip
        finally:
            self.pipe.scheduler = own


def _inputs(source: ImageSource, rows: Sequence[int]) -> dict[str, Any]:
    """The pipeline's inputs for some rows of the source; an unconditional model's number of samples follows from the seeds."""
    if source.captions is not None:
        return {"prompt": [source.captions[row] for row in rows]}
    if source.labels is not None:
        return {"class_labels": [source.labels[row] for row in rows]}
    return {}


class _Data:
    """The samples on the device, split into training and validation."""

    def __init__(self, pool: _Pool, config: DiscriminatorConfig) -> None:
        self.device = pool.denoiser.device
        self.seed = config.train.seed
        real, fake = pool.samples("real"), pool.samples("fake")
        cond = _conditions(pool) if config.conditional else None
        self.condition_name = None if cond is None else cond[0]
        values = None if cond is None else cond[1]
        # By picture, not by row: a picture that appears several times must not be on both sides.
        held = torch.tensor(pool.source.groups[: len(real)]) % round(1 / config.held_out) == 0
        count = torch.arange(len(fake)) >= len(fake) * (1 - config.held_out)

        def half(real_rows: Tensor, fake_rows: Tensor) -> _Half:
            return _Half(
                real[real_rows], fake[fake_rows],
                None if values is None else values[real_rows], None if values is None else values[fake_rows],
            )  # fmt: skip

        self.training, self.validation = half(~held, ~count), half(held, count)
        if not (len(self.training.real) and len(self.validation.real)):
            raise ValueError("There are too few real images to hold any out. Give more.")


def _conditions(pool: _Pool) -> tuple[str, Tensor] | None:
    """Name and values (N, ...) of the model's condition; token embeddings as their means (N, D), all that the head sees."""
    rows = range(pool.config.count)
    inputs = _inputs(pool.source, rows)
    if not inputs:
        return None
    parts = []
    for start in range(0, len(rows), SHARD):
        part = {{"prompt": "prompts", "class_labels": "labels"}[key]: value[start : start + SHARD] for key, value in inputs.items()}
        cond = pool.denoiser.condition(**part)
        name = next(iter(cond.tensors))
        value = cond.tensors[name]
        parts.append((value.float().mean(1) if value.is_floating_point() and value.ndim == 3 else value).cpu())
    return name, torch.cat(parts)


def _build(pipe: GuidedPipeline, data: _Data, config: DiscriminatorConfig) -> Discriminator:
    condition = None
    values = data.training.real_cond
    if values is not None and values.is_floating_point():
        condition = {"name": data.condition_name, "channels": values.shape[-1]}
    elif values is not None:
        condition = {"name": data.condition_name, "num_classes": int(pipe.denoiser.network.config.num_embeds_ada_norm)}
    how = {"steps": list(config.steps), "sampler": config.sampler, "guidance_scale": config.guidance_scale}
    classifier = None if config.extractor is None else load_noisy_classifier(config.extractor)
    torch.manual_seed(config.train.seed)
    model = Discriminator(
        tuple(data.training.real.shape[1:]), config.head, None if classifier is None else dict(classifier.config.encoder),
        condition, None if classifier is None else [len(names) for names in classifier.config.labels.values()],
        origin(pipe.host, samples=how),
    )  # fmt: skip
    if classifier is not None:
        model.extractor.load_state_dict(classifier.trunk.state_dict())
        if model.match is not None:
            for own, head in zip(model.match.heads, classifier.heads.values(), strict=True):
                own.load_state_dict(head.state_dict())
    return model


def _learn_matching(
    model: Discriminator, data: _Data, config: DiscriminatorConfig, folder: Path, resume: bool, ranks: Ranks
) -> None:
    """Train `model.match` on real samples and their conditions; it is frozen afterwards, as the extractor is."""
    real, conditions = data.training.real, data.training.real_cond
    # A discriminator has the part to train only if it has both of these.
    assert model.extractor is not None
    assert model.match is not None
    assert conditions is not None
    extractor = model.extractor.to(data.device)

    def loss(match: Any, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(real), (config.matching.batch_size,), generator=generator)
        level = random_levels(len(rows), generator, *config.sigmas)
        x = level.diffuse(real[rows], torch.randn(real[rows].shape, generator=generator)).to(data.device)
        with torch.no_grad():
            h = extractor(x, level)
        return matching_loss(match(h, conditions[rows].to(data.device)))

    trained = fit(model.match, loss, config.matching, folder, name="matching", resume=resume, device=str(data.device), ranks=ranks)
    model.match = trained.requires_grad_(False)


def _loss(model: Any, half: _Half, count: int, sigmas: tuple[float, float], generator: torch.Generator, device: Any) -> Tensor:
    """The loss of `count` real and `count` generated samples, each at its own level."""
    level = random_levels(count, generator, *sigmas)
    noisy, conds = [], []
    for samples, values in ((half.real, half.real_cond), (half.fake, half.fake_cond)):
        rows = torch.randint(len(samples), (count,), generator=generator)
        x0 = samples[rows]
        noisy.append(level.diffuse(x0, torch.randn(x0.shape, generator=generator)).to(device))
        conds.append(_cond(model, None if values is None else values[rows], device))
    return bce(model, noisy[0], noisy[1], level, (conds[0], conds[1]))


def _validate(model: Any, data: _Data) -> dict[str, float]:
    """Loss (the mean) and loss at each of `VALIDATION_RATIOS` on what was held out, always with the same noise."""
    figures = {}
    half = data.validation
    count = min(len(half.real), len(half.fake), 1000)
    for i, ratio in enumerate(VALIDATION_RATIOS):
        generator = torch.Generator().manual_seed(data.seed + i)
        level = Level(1.0, ratio, 0.0)
        losses = []
        for rows in torch.arange(count).split(250):
            noisy = [
                level.diffuse(s[rows], torch.randn(s[rows].shape, generator=generator)).to(data.device)
                for s in (half.real, half.fake)
            ]
            conds = [_cond(model, None if v is None else v[rows], data.device) for v in (half.real_cond, half.fake_cond)]
            losses.append(bce(model, noisy[0], noisy[1], level, (conds[0], conds[1])).item() * len(rows))
        figures[f"sigma {ratio:g}"] = sum(losses) / count
    return {"loss": sum(figures.values()) / len(figures), **figures}


def _cond(model: Any, values: Tensor | None, device: Any) -> Cond | None:
    return None if values is None else Cond({model.config.condition["name"]: values.to(device)})
