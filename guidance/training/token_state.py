"""How to train class tokens, and what is known of each token on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genkit.tokens import write_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """How to train class tokens. Figures of the paper are those of its code, with Stable Diffusion.

    Args:
        prompts: what is drawn, with "{token}" where the token goes; image i takes prompt i modulo their number.
        updates: longest run (the paper's 50).
        evaluations: K, how many of the last network evaluations are differentiated (2, as the paper's scheduler has it).
        steps: sampling steps of each training image (the paper: 30).
        cfg: scale of classifier-free guidance, as the tokens will be used (the paper: 7).
        batch: images of each class an update (the paper: 5); time and memory grow with it.
        lr: of AdamW with betas (0.9, 0.999), relative to the root mean square of the embedding that training starts from, so
            that one value serves all text encoders (0.1 is the paper's 0.00125 on Stable Diffusion).
        weight_decay: of the token alone.
        grad_clip: largest norm of a token's gradient, applied after the backward pass.
        vectors: embedding vectors of a token, 1 to 16; a prompt holds that many tokens of the text encoder.
        init: word to start from (mean of its embeddings; the paper's "a"). One for the kind of thing, such as "digit" or "bird",
            starts where the pictures already vary in what the guide reads.
        resample: draw new noise at every update; False repeats the noise of the first (as the paper does).
        threshold: a token is finished when more than this share of its images is read right by the guide in each of `window`
            updates in a row (the paper: 0.7, once); None never.
        patience: a token is finished after so many updates without a lower loss (the paper: 15).
        seed: of the noise; independent of the seeds of sampling.
        height, width: of the images in pixels; by default the model's own.
        gradient_checkpointing: less memory for more time.

    Raises:
        ValueError: a field out of its range.
    """

    prompts: tuple[str, ...] = ("a photo of a {token}",)
    updates: int = 50
    evaluations: int = 2
    steps: int = 12
    cfg: float = 2.0
    batch: int = 16
    lr: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    vectors: int = 1
    init: str = "a"
    resample: bool = True
    threshold: float | None = 0.9
    window: int = 3
    patience: int = 15
    seed: int = 0
    height: int | None = None
    width: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts:
            raise ValueError(f"prompts={self.prompts!r} must be one or several texts, as in ('a red {{token}}',).")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        for prompt in self.prompts:
            if "{token}" not in prompt:
                raise ValueError(f"The prompt {prompt!r:.200} says nowhere where the token goes. Write {{token}} into it.")
        for name in ("updates", "evaluations", "steps", "batch", "window", "patience"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("vectors", self.vectors, 1 <= self.vectors <= 16, "1 to 16")
        for name in ("lr", "grad_clip"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "positive and finite")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _require("cfg", self.cfg, math.isfinite(self.cfg), "finite")
        _require("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2^31 - 1")
        if self.threshold is not None:
            _require("threshold", self.threshold, 0 <= self.threshold < 1, "0 up to, but not including, 1 (or None)")


@dataclasses.dataclass(frozen=True)
class TrainedToken:
    """A token and how well the guide reads the images drawn with it.

    Args:
        token: what prompts say, "<seven>".
        vectors: (n, D) float32, by "" for one text encoder, by "clip_l" and "clip_g" for two.
        loss: mean of minus the guide's log-potential over the images of the best update.
        accuracy: share of these that the guide reads right; None for a guide that only has a log-potential.
        updates: how many there were.
        finished: "threshold", "patience" or "updates".
    """

    token: str
    vectors: dict[str, Tensor]
    loss: float
    accuracy: float | None
    updates: int
    finished: str

    def save(self, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write a textual-inversion file (see `genkit.tokens`); the figures go into its header, with `metadata`."""
        figures = {name: getattr(self, name) for name in ("loss", "accuracy", "updates", "finished")}
        write_token(path, self.token, self.vectors, {**(metadata or {}), **figures})


@dataclasses.dataclass
class Learner:
    """A token in training: its vectors, and the best so far."""

    token: str
    vectors: dict[str, nn.Parameter]
    best: dict[str, Tensor]
    loss: float = math.inf
    accuracy: float | None = None
    updates: int = 0
    best_update: int = 0
    streak: int = 0
    finished: str | None = None

    def read(self, loss: float, accuracy: float | None, config: TokenConfig) -> None:
        """Take in what an update measured, before it changes the vectors."""
        self.updates += 1
        if loss < self.loss:
            self.loss, self.accuracy, self.best_update = loss, accuracy, self.updates
            self.best = {key: value.detach().clone() for key, value in self.vectors.items()}
        right = accuracy is not None and config.threshold is not None and accuracy > config.threshold
        self.streak = self.streak + 1 if right else 0
        if self.streak >= config.window:
            self.finished = "threshold"
        elif self.updates - self.best_update >= config.patience:
            self.finished = "patience"

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "vectors": {key: value.detach() for key, value in self.vectors.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """What `state` returned."""
        for key, value in state.pop("vectors").items():
            self.vectors[key].data.copy_(value)
        for name, value in state.items():
            setattr(self, name, value)

    def trained(self) -> TrainedToken:
        """The best so far."""
        return TrainedToken(self.token, self.best, self.loss, self.accuracy, self.updates, self.finished or "updates")


def _require(name: str, value: Any, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} must be {what}.")
