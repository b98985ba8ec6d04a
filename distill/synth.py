"""Synthetic data: clean latents that a teacher samples at a constant guidance scale, for its students to learn from.

With samples of the teacher for real data, adversarial distillation needs no distillation loss, keeps to prompts more closely, and
bakes classifier-free guidance in, so the student runs without (Sauer et al., Fast High-Resolution Image Synthesis with Latent
Adversarial Diffusion Distillation, 2024, arXiv 2403.12015).

Item i is a function of the settings and i alone, whatever the batch, the number of processes and interruptions: its prompt is
number i of the prompts, repeated as needed, and its noise that of seed (seed + 1) 2^32 + i. `genkit sample --seeds` of that number
draws it again; the small seeds, with which people look at models, are never trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genkit import noise, samplers
from genkit.denoisers.text import TextDenoiser
from genkit.distill.config import read_table
from genkit.distill.data import LatentDataset, latent_space
from genkit.distill.shards import STORAGE, SYNTH, Content, Part, fill, identity
from genkit.errors import unknown
from genkit.features.cache import model_identity
from genkit.ranks import Ranks

if TYPE_CHECKING:
    from genkit.pipelines import GuidedPipeline

MAX_SEED = 2**31 - 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """How a teacher is sampled.

    Args:
        guidance_scale: classifier-free guidance, 1 is off. 3 is that of AMD's Nitro (SD 2.1, PixArt); SD3 takes 5, `digits` 2.
        steps: sampling steps; 50 as Nitro has.
        sampler: a name of `genkit.samplers`; None is the model's own. With a deterministic one each item is a pair of noise and
            what it becomes.
        eta: noise of DDIM-like samplers, 0 to 1.
        height, width: in pixels; the model's own by default.
        seed: another seed gives other items, 0 to 2^31 - 2.
        storage: "float16" or "float32", of what is stored.
        embeds: also store the encoded prompts, so that training needs no text encoder. Of SD 1.5 that is 118 kB an item.
        shard_size: items in a file; an interruption costs at most one.

    Raises:
        ValueError: a value out of range, or an unknown name.
    """

    guidance_scale: float = 3.0
    steps: int = 50
    sampler: str | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    seed: int = 0
    storage: str = "float16"
    embeds: bool = False
    shard_size: int = 200

    def __post_init__(self) -> None:
        if self.sampler is not None:
            samplers.require(self.sampler)
        if self.storage not in STORAGE:
            raise unknown("storage", self.storage, STORAGE)
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must be 0 to {MAX_SEED}.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be 0 to 1.")
        if not 0 <= self.guidance_scale <= 1000:
            raise ValueError(f"guidance_scale={self.guidance_scale} must be 0 to 1000; 1 is off.")
        for name in ("steps", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @classmethod
    def preset(cls, recipe: Path | None = None, **changes: Any) -> SynthConfig:
        """The settings of a recipe, then `changes` that are not None.

        Args:
            recipe: a TOML file whose [synth] table has these settings.

        Raises:
            ValueError: a file or a setting that cannot be used; of an unknown one the message has the closest.
        """
        values: dict[str, Any] = {} if recipe is None else read_table(recipe, "synth")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown("setting of samples", name, known)
        try:
            return cls(**values | {name: value for name, value in changes.items() if value is not None})
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"A setting has a value of another type: {error}.") from error


def synthesize(
    pipe: GuidedPipeline,
    folder: str | Path,
    config: SynthConfig | None = None,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int | str] | None = None,
    count: int | None = None,
    batch_size: int = 16,
    resume: bool = False,
    ranks: Ranks | None = None,
    progress: Callable[[int], None] | None = None,
) -> LatentDataset:
    """Sample a teacher into a folder, or make what is missing of it.

    Args:
        pipe: the teacher.
        prompts: of a text-to-image model, repeated as needed; "" is the null prompt.
        labels: of a class-conditional model, numbers or names, repeated as needed.
        count: items; by default one for each prompt or label.
        batch_size: items at a time; it changes none by more than rounding.
        resume: go on with what is in the folder.
        ranks: processes that share the work, after `Ranks.join`.
        progress: called with the number of items that are there since the last call.

    Raises:
        ValueError: prompts or labels that do not fit the model, nothing to make, or a folder that was made with other settings
            (the message names the difference).
        FloatingPointError: the sampler became NaN or infinite.
        OSError: the folder cannot be written or the disk is full; finished shards stay.

    Example:
        >>> pipe = GuidedPipeline.from_pretrained("digits")
        >>> data = synthesize(pipe, "data", SynthConfig(guidance_scale=2.0, sampler="dpm++", steps=16), prompts=captions)
        >>> data.latents([0, 7]).shape, data.prompts[7]
    """
    config, ranks, progress = config or SynthConfig(), ranks or Ranks(), progress or (lambda items: None)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    sampler = _Sampler(pipe, config, _Subjects(prompts, labels, count), batch_size, progress)
    with sampler.ready():
        fill(Path(folder), SYNTH, sampler.settings(), sampler.parts(), sampler.make, resume=resume, ranks=ranks, progress=progress)
    return LatentDataset(folder)


class _Subjects:
    """What each of `count` items shows: a prompt, a label, or nothing."""

    def __init__(self, prompts: Sequence[str] | None, labels: Sequence[int | str] | None, count: int | None) -> None:
        if prompts is not None and labels is not None:
            raise ValueError(
                "Both prompts and labels were given. Text-to-image models take prompts, class-conditional ones labels."
            )
        self.kind = "prompts" if prompts is not None else "labels" if labels is not None else None
        self.values: list[Any] = list(prompts if prompts is not None else labels if labels is not None else [])
        self.count = len(self.values) if count is None else count
        if self.count < 1 or (self.kind is not None and not self.values):
            raise ValueError(
                "There is nothing to sample. Give at least one prompt or label, or a count for an unconditional model."
            )

    def of(self, rows: Sequence[int]) -> list[Any]:
        return [self.values[row % len(self.values)] for row in rows]

    def inputs(self, values: Sequence[Any]) -> dict[str, Any]:
        """What `Denoiser.condition` takes for some values."""
        return {} if self.kind is None else {self.kind: list(values)}


class _Sampler:
    """Makes shards with a pipeline."""

    def __init__(
        self, pipe: GuidedPipeline, config: SynthConfig, subjects: _Subjects, batch_size: int, progress: Callable[[int], None]
    ) -> None:
        self.pipe, self.config, self.subjects = pipe, config, subjects
        self.batch_size, self.progress = batch_size, progress
        self.denoiser = pipe.denoiser
        self.shape = self.denoiser.latent_shape(config.height, config.width)
        # What does not fit the model is refused before anything is written: all labels, and of prompts that there are any.
        self.denoiser.condition(**subjects.inputs(subjects.values[:1] if subjects.kind == "prompts" else subjects.values))

    def parts(self) -> list[Part]:
        starts = range(0, self.subjects.count, self.config.shard_size)
        return [Part(range(i, min(i + self.config.shard_size, self.subjects.count)), self.shape) for i in starts]

    def settings(self) -> dict[str, Any]:
        config, subjects = self.config, self.subjects
        return {
            "teacher": model_identity(self.pipe.host), "space": latent_space(self.denoiser), "shape": list(self.shape),
            "count": subjects.count, "conditions": f"{len(subjects.values)} {subjects.kind} ({identity(subjects.values)})",
            "guidance_scale": config.guidance_scale, "steps": config.steps,
            "sampler": config.sampler or type(self.pipe.scheduler).__name__, "eta": config.eta, "seed": config.seed,
            "dtype": str(self.denoiser.dtype).removeprefix("torch."), "storage": config.storage, "embeds": config.embeds,
            "shard_size": config.shard_size,
        }  # fmt: skip

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The pipeline with the sampler of the configuration, for a while."""
        own = self.pipe.scheduler
        try:
            if self.config.sampler is not None:
                self.pipe.scheduler = samplers.build(self.config.sampler, own)
            yield
        finally:
            self.pipe.scheduler = own

    def make(self, part: Part) -> Content:
        """The items of a shard."""
        latents, paired = [], True
        for i in range(0, len(part.rows), self.batch_size):
            rows = part.rows[i : i + self.batch_size]
            z, deterministic = self._sample(rows)
            latents.append(z.cpu())
            paired = paired and deterministic
            self.progress(len(rows))
        values = self.subjects.of(part.rows) if self.subjects.kind is not None else []
        tensors = {"latents": torch.cat(latents), "seed": torch.tensor(self._seeds(part.rows))}
        if self.config.embeds:
            tensors |= _embeddings(self.denoiser, self.subjects.inputs(values))
        if isinstance(self.denoiser, TextDenoiser):
            self.denoiser.forget()  # else a hundred thousand encoded prompts stay in memory
        return tensors, {"paired": paired, **self.subjects.inputs(values)}

    def _seeds(self, rows: Sequence[int]) -> list[int]:
        return [((self.config.seed + 1) << 32) + row for row in rows]

    def _sample(self, rows: Sequence[int]) -> tuple[Tensor, bool]:
        """Clean latents (B, c, h, w), and whether they are a function of their initial noise alone."""
        config, seeds = self.config, self._seeds(rows)
        values = self.subjects.of(rows) if self.subjects.kind is not None else []
        # Generators of our own, so that a sampler that drew from them can be told from one that did not.
        generators = noise.generators(seeds, noise.SAMPLER)
        before = [g.get_state() for g in generators]
        latents = self.pipe(
            prompt=values if self.subjects.kind == "prompts" else None,
            class_labels=values if self.subjects.kind == "labels" else None,
            height=config.height, width=config.width, num_inference_steps=config.steps, guidance_scale=config.guidance_scale,
            eta=config.eta, latents=noise.normal(seeds, self.shape), generator=generators, output_type="latent",
        ).images  # fmt: skip
        return latents, all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


def _embeddings(denoiser: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The condition of some items as tensors of a shard: `cond.NAME` (n, ...), and `null.NAME` (1, ...), the same for all."""
    cond = denoiser.condition(**inputs)
    null = {f"null.{name}": value[:1] for name, value in (cond.null_tensors or {}).items()}
    return {f"cond.{name}": value for name, value in cond.tensors.items()} | null
