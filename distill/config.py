"""What a distillation is: its method, levels, losses, optimisation and bookkeeping, as one frozen record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from genkit.distill.samplers import LevelSampler, NoiseSampler
from genkit.distill.spec import TASKS
from genkit.errors import unknown
from genkit.files import read_toml

METHODS = ("ladd", "add")
TAP_SETS = ("quarter", "half", "all")  # what `taps` may say instead of names
SCHEDULES = ("constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial")  # of diffusers
# What may differ between a run and its continuation.
FREE = ("steps", "checkpoint_every", "checkpoints_limit", "preview_every", "preview_count", "log_every", "trackers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How to distil a teacher. The defaults are those of LADD (Sauer et al. 2024, arXiv 2403.12015) as far as they are published.

    Args:
        method: "ladd": the discriminator reads the teacher's features of noised latents; "add": an image encoder's features of
            decoded pictures (Sauer et al. 2023, arXiv 2311.17042).
        teacher: name, folder or repository of the teacher, for records and the export.
        levels: fractions of the training time at which the student works, descending from 1 (pure noise).
        level_probs, warmup_probs, warmup_steps: how often each is trained, and how often in the first rounds
            (LADD: .7, .1, .1, .1 after 500 rounds of 0, 0, .5, .5); by default all alike.
        gan: loss of the discriminator: "hinge", "softplus" or "lsgan".
        disc_noise: noise at which the discriminator sees latents (LADD), see `NoiseSampler.parse`. A larger mean of the logit looks
            at global structure, a smaller one at texture; the paper's is 1, and 0 suits latents below 64 x 64.
        same_noise_level: real and fake samples get the same level, each its own noise.
        taps: where the teacher is read: one of `TAP_SETS`, see `genkit.distill.sources.TeacherTaps`, or names.
        head, head_width: "conv2d", "mlp" (for vectors) or "stylegan-t", see `genkit.distill.heads`; width of the first two.
        spectral_norm: of the heads' layers.
        disc_condition: what heads are told besides the time: any of "text" (or class) and "image" (of the student's input; ADD).
        mismatched: real samples with the conditions of others are fakes too; has an effect on conditional teachers only.
        r1: weight of the gradient penalty on head inputs (ADD: 1e-5).
        r1_every: rounds from one penalty to the next, which is as many times larger ("lazy": Karras et al. 2019, arXiv 1912.04958,
            whose 16 it is).
        approximate_r1: weight of the finite-difference penalty instead; `approximate_r1_std` is its perturbation.
        adversarial, distillation, reconstruction: weights of the generator's losses: against the discriminator; to the teacher's
            denoising of the student's samples (ADD: 2.5; 0.5 for LADD on real data, 0 on synthetic); to the clean samples
            themselves, which at level 1 are those that the teacher makes of the same noise (needs paired data; AMD's Nitro-1).
        distillation_weight, distillation_space, distillation_guidance: "alpha", "sds" or "const"; "latent" or "pixel"; scale of
            classifier-free guidance in the teacher.
        encoder, augment: image encoder of ADD, a timm ViT or an embedded classifier; whether it sees pictures recoloured, moved and
            cut out at random, which keeps heads from learning a small data set by heart, and makes them learn more slowly.
        task: "generate"; "inpaint": the student gets random masks and what is outside of them, as Stable Diffusion's inpainting
            networks do, and only the inside is its own. The noise is always fresh then, so `reconstruction` needs no pairs.
        init: what the student starts from instead of the teacher: a run (its averaged student), a folder of a network, or an
            embedded model or a folder of a pipeline that has one.
        lora_rank: 0 trains all weights, else adapters of this rank.
        lr, disc_lr: learning rates of AdamW, betas (0, 0.99); `lr` defaults to 1e-5, or 5e-5 for LoRA.
        lr_scheduler, lr_warmup: of `SCHEDULES`, and its warm-up in rounds.
        weight_decay, grad_clip, ema: of the student; `grad_clip` also of the heads, 0 for none; `ema` counts student updates.
        ema_every, ema_host: rounds after which the average follows; whether it lives in host memory instead of the device's.
        steps: rounds; each is one update of the discriminator and one of the student.
        batch_size: samples of a round, over all processes and micro-batches.
        accumulation: micro-batches of a round.
        fused: one pass of student and teacher for both updates; by default wherever there is one micro-batch.
        mixed_precision: "no" or "bf16"; weights stay float32.
        gradient_checkpointing: recompute activations of the student, and of the teacher in the generator's phase.
        seed: of everything random.
        retries: how often a round that became NaN or infinite is tried with other noise.
        checkpoint_every, checkpoints_limit, preview_every, preview_count, log_every: in rounds; limits and counts; 0 is never.
        trackers: of accelerate: "tensorboard", "wandb", ...

    Raises:
        ValueError: a value out of range; the message names it.
    """

    method: str = "ladd"
    teacher: str = ""
    levels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    level_probs: tuple[float, ...] | None = None
    warmup_probs: tuple[float, ...] | None = None
    warmup_steps: int = 0
    gan: str = "hinge"
    disc_noise: str = "logit-normal:1,1"
    same_noise_level: bool = False
    taps: str | tuple[str, ...] = "quarter"
    head: str = "conv2d"
    head_width: int = 256
    spectral_norm: bool = True
    disc_condition: tuple[str, ...] = ("text",)
    mismatched: bool = True
    r1: float = 1e-5
    r1_every: int = 16
    approximate_r1: float = 0.0
    approximate_r1_std: float = 0.1
    adversarial: float = 1.0
    distillation: float = 0.0
    reconstruction: float = 0.0
    distillation_weight: str = "alpha"
    distillation_space: str = "latent"
    distillation_guidance: float = 1.0
    encoder: str = ""
    augment: bool = True
    task: str = "generate"
    init: str = ""
    lora_rank: int = 0
    lr: float | None = None
    disc_lr: float = 1e-4
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup: int = 0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.999
    ema_every: int = 1
    ema_host: bool = False
    steps: int = 10_000
    batch_size: int = 64
    accumulation: int = 1
    fused: bool | None = None
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    retries: int = 3
    checkpoint_every: int = 500
    checkpoints_limit: int = 3
    preview_every: int = 500
    preview_count: int = 8
    log_every: int = 10
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        for name, known in (
            ("gan", ("hinge", "softplus", "lsgan")), ("head", ("conv2d", "mlp", "stylegan-t")),
            ("distillation_weight", ("alpha", "sds", "const")), ("distillation_space", ("latent", "pixel")),
            ("mixed_precision", ("no", "bf16")), ("task", TASKS), ("lr_scheduler", SCHEDULES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value == "fp16" and name == "mixed_precision":
                raise ValueError("mixed_precision='fp16' makes adversarial distillation diverge. Use bf16, or no.")
            if value not in known:
                raise unknown(name, str(value), known)
        for names, kind, what in (
            (("levels", "level_probs", "warmup_probs"), (int, float), "must be a list of numbers"),
            (("disc_condition", "trackers"), str, "must be a list of texts"),
        ):
            for name in names:
                value = getattr(self, name)
                self._require(name, value is None or (isinstance(value, tuple) and all(isinstance(v, kind) for v in value)), what)
        LevelSampler(self.levels, self.level_probs, self.warmup_probs, self.warmup_steps)
        NoiseSampler.parse(self.disc_noise)
        for name in ("steps", "batch_size", "accumulation", "log_every", "head_width", "disc_lr", "r1_every", "ema_every"):
            self._require(name, getattr(self, name) > 0, "must be positive")
        for name in (
            "warmup_steps", "r1", "approximate_r1", "adversarial", "distillation", "reconstruction", "lora_rank", "weight_decay",
            "grad_clip", "retries", "checkpoint_every", "checkpoints_limit", "preview_every", "preview_count", "lr_warmup",
        ):  # fmt: skip
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        self._require("lr", self.lr is None or self.lr > 0, "must be positive")
        self._require("ema", 0 <= self.ema < 1, "must be at least 0 and below 1")
        self._require("adversarial", self.adversarial + self.distillation + self.reconstruction > 0, "and all other losses are 0")
        self._require("batch_size", self.batch_size % self.accumulation == 0, f"is no multiple of accumulation={self.accumulation}")
        if self.fused and self.accumulation > 1:
            raise ValueError(
                f"A fused round keeps the graph of its whole batch. Leave accumulation={self.accumulation} or fused out."
            )
        if self.init and self.lora_rank:
            raise ValueError("A LoRA starts at its teacher. To go on from another student, train all weights, or resume its run.")
        if self.method == "add" and not self.encoder:
            raise ValueError("ADD needs an image encoder. Give encoder, for instance 'vit_small_patch14_dinov2'.")
        if "image" in self.disc_condition and self.method != "add":
            raise ValueError("disc_condition 'image' is an embedding of ADD's image encoder. Use it with method='add'.")

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{name}={getattr(self, name)!r} {what}.")

    @property
    def learning_rate(self) -> float:
        """`lr`, or its default for what is trained."""
        if self.lr is not None:
            return self.lr
        return 5e-5 if self.lora_rank else 1e-5

    @property
    def needs_output(self) -> bool:
        """Whether rounds need what the teacher predicts, not only its features."""
        return self.distillation > 0

    @property
    def needs_pictures(self) -> bool:
        """Whether latents are decoded: for ADD's encoder, the rest of a masked picture, a loss in pixel space, previews."""
        in_pixels = self.distillation > 0 and self.distillation_space == "pixel"
        return self.method == "add" or self.task == "inpaint" or in_pixels or self.preview_every > 0

    @property
    def is_fused(self) -> bool:
        """Whether the student's pass serves both updates."""
        return self.accumulation == 1 if self.fused is None else self.fused

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> DistillConfig:
        """From JSON or TOML values.

        Raises:
            ValueError: an unknown name (the message has the closest), or a value of another type or range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for name in content:
            if name not in known:
                raise unknown("setting of a distillation", name, list(known))
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
        try:
            return cls(**values)
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"A setting has a value of another type: {error}.") from error

    @classmethod
    def preset(cls, method: str, *, synthetic: bool, side: int, recipe: Path | None = None, **changes: Any) -> DistillConfig:
        """The settings of a method, then those of a recipe, then `changes` that are not None.

        Args:
            synthetic: the data are samples of the teacher, to which LADD needs no distillation loss; on real data it has 0.5.
            side: of the latents; below 64 the discriminator looks at less noise.
            recipe: a TOML file whose [distill] table has these settings.

        Raises:
            ValueError: a method, setting or file that cannot be used.
        """
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        values: dict[str, Any] = {"method": method}
        if method == "ladd":
            values |= {
                "disc_noise": "logit-normal:0,1" if side < 64 else "logit-normal:1,1",
                "distillation": 0.0 if synthetic else 0.5,
            }
        else:
            values |= {
                "distillation": 2.5, "distillation_space": "pixel", "encoder": "vit_small_patch14_dinov2", "mismatched": False,
                "disc_condition": ("text", "image"),
            }  # fmt: skip
        if recipe is not None:
            table = read_table(recipe, "distill")
            if table.get("method", method) != method:
                raise ValueError(f"The recipe {str(recipe)!r} is for {table['method']!r}, not {method!r}.")
            values |= table
        return cls.from_json(values | {name: value for name, value in changes.items() if value is not None})


def recipe_teacher(recipe: Path) -> str | None:
    """The teacher that a recipe names in its [distill] table; None if it names none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML.
    """
    if not recipe.is_file():
        raise FileNotFoundError(f"There is no recipe {str(recipe)!r}.")
    teacher = read_table(recipe, "distill").get("teacher")
    if teacher is not None and not isinstance(teacher, str):
        raise ValueError(f"The teacher of {str(recipe)!r} is {teacher!r:.80}. Give a name, a folder or a repository.")
    return teacher


def read_table(recipe: Path, name: str) -> dict[str, Any]:
    """A table of a recipe; empty if it has none of that name.

    Raises:
        ValueError: it is no TOML, or the name is that of something else.
    """
    table = read_toml(recipe).get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"[{name}] of {str(recipe)!r} is no table. Repair it.")
    return table
