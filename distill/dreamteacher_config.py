"""What a DreamTeacher distillation is, as one frozen record, and the settings that the paper and genkit recommend."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from genkit.distill.dreamteacher_losses import WHITENINGS
from genkit.distill.dreamteacher_regressors import REGRESSORS
from genkit.errors import unknown
from genkit.training import TrainConfig

ENCODINGS = ("stochastic", "ddim")
TASKS = ("none", "classification", "segmentation")
# AdamW of the paper (appendix): weight decay .05, betas (.9, .95), cosine decay; 100 epochs, 20 of them warm-up.
_PAPER = TrainConfig(steps=40_000, batch_size=256, lr=4e-3, warmup=8000, weight_decay=0.05, betas=(0.9, 0.95), ema_decay=0.0)
_DIGITS = dataclasses.replace(_PAPER, steps=1800, batch_size=128, lr=2e-3, warmup=90, ema_decay=0.99)
_INTERPRETER = TrainConfig(steps=400, batch_size=40, lr=1e-3, warmup=20, weight_decay=0.05, ema_decay=0.98, bf16=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DreamTeacherConfig:
    """How to distil a diffusion model's features into a backbone. Defaults are those of the paper (arXiv 2307.07487).

    Args:
        teacher: name, folder or repository of the teacher, for records and the card.
        backbone: any model of timm that gives intermediate features.
        size: side in pixels of the backbone's pictures; by default the teacher's. A larger one gives larger maps, which then match
            finer taps: the backbone of a latent teacher of 32 x 32 pictures sees more at 64.
        taps: places in the teacher, see `genkit.features.taps`; () are the last block of each resolution of a UNet's decoder,
            before its up-sampling, as far as the backbone has maps as large, which in ADM-256 are those of the paper.
        t: timesteps of the noise on the pictures; of several, each picture gets one at random. 50 in the paper, 150 for ImageNet.
        encoding: "stochastic": fresh noise; "ddim": the deterministic encoding of Song et al. 2020 in `ddim_steps` steps, which
            needs the whole network and one t. (The paper finds the first better.)
        regressor: see `genkit.distill.dreamteacher_regressors`; "auto" is "simple" for a backbone of one resolution, else
            "ppm-fpn".
        width: of the regressor and of the interpreter.
        whitening: of the teacher's features, see `genkit.distill.dreamteacher_losses.whiten`.
        mse, attention: weights of the two parts of L_feat.
        power: p of attention maps.
        label: weight of L_ld; 0 leaves the label branch out. `mse=0, attention=0` is label distillation alone.
        task: of the label branch: "classification" or "segmentation".
        labelled: pictures whose labels train the interpreter, chosen by the seed, evenly over the classes.
        temperature: of the softened logits.
        flip: add the mirror image of each picture.
        teacher_bf16: the teacher computes in bfloat16.
        interpreter: training of the label branch on the labelled pictures.
        train: training of the student; its batch is that of each process.

    Raises:
        ValueError: an unknown choice or a value out of range; the message names it.
    """

    teacher: str = ""
    backbone: str = "resnet50"
    size: int | None = None
    taps: tuple[str | int, ...] = ()
    t: tuple[int, ...] = (50,)
    encoding: str = "stochastic"
    ddim_steps: int = 10
    regressor: str = "auto"
    width: int = 256
    whitening: str = "chw"
    mse: float = 1.0
    attention: float = 10.0
    power: float = 2.0
    label: float = 0.0
    task: str = "none"
    labelled: int = 40
    temperature: float = 4.0
    flip: bool = True
    teacher_bf16: bool = True
    interpreter: TrainConfig = _INTERPRETER
    train: TrainConfig = _PAPER

    def __post_init__(self) -> None:
        for name, known in (
            ("encoding", ENCODINGS), ("regressor", ("auto", *REGRESSORS)), ("whitening", WHITENINGS), ("task", TASKS),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        for name in ("ddim_steps", "width", "power", "labelled", "temperature"):
            self._require(name, getattr(self, name) > 0, "must be positive")
        for name in ("mse", "attention", "label"):
            self._require(name, getattr(self, name) >= 0, "must not be negative")
        self._require("size", self.size is None or self.size > 0, "must be positive")
        self._require("t", len(self.t) > 0, "must name a timestep")
        self._require("mse", self.mse + self.attention + self.label > 0, "and all other losses are 0")
        if self.encoding == "ddim" and len(self.t) > 1:
            raise ValueError(f"The ddim encoding goes to one timestep, but t={self.t} has {len(self.t)}. Give one.")
        if (self.label > 0) != (self.task != "none"):
            raise ValueError(f"label={self.label} and task={self.task!r} do not go together. Give both, or neither.")

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{name}={getattr(self, name)!r} {what}.")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DreamTeacherConfig:
        """The settings of a preset, then `changes` that are not None; those of `train` by their own names.

        With other `steps` the warm-up keeps its share of them, and the main text's learning rate follows the batch.

        Raises:
            ValueError: an unknown preset or value.
        """
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        given = {key: value for key, value in changes.items() if value is not None}
        own = {key: given.pop(key) for key in list(given) if key in names}
        preset = PRESETS[name]
        loop = preset.train
        own.setdefault("warmup", loop.warmup * own.get("steps", loop.steps) // loop.steps)
        if name == "main-text":
            own.setdefault("lr", 2e-4 * own.get("batch_size", loop.batch_size) / 256)
        return dataclasses.replace(preset, **given, train=dataclasses.replace(loop, **own))


# The paper disagrees with itself: its main text has a peak learning rate of 2e-4 * batch / 256, its appendix 4e-3; its ablation
# finds t = 250 the best, its runs use 50, and 150 for ImageNet.
PRESETS: dict[str, DreamTeacherConfig] = {
    "appendix": DreamTeacherConfig(),
    "main-text": DreamTeacherConfig(train=dataclasses.replace(_PAPER, lr=2e-4)),
    "ablation": DreamTeacherConfig(t=(250,)),
    "imagenet": DreamTeacherConfig(
        t=(150,), train=dataclasses.replace(_PAPER, steps=125_000, batch_size=2048, warmup=18_750, optimizer="lamb")
    ),
    "digits": DreamTeacherConfig(
        backbone="resnet18", size=64, taps=("block.6", "block.8"), t=(30, 100), width=128, flip=False, train=_DIGITS
    ),
}
