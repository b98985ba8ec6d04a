"""What a guidance sees of a run, and how it asks for the network."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from genkit.levels import Level
from genkit.prediction import Prediction


class Predict(Protocol):
    """Evaluates the network at `state.x`; with `grad=True` the prediction keeps a graph to `prediction.x`, a leaf."""

    def __call__(self, *, grad: bool = False) -> Prediction: ...


@dataclasses.dataclass
class State:
    """What a guidance sees.

    Args:
        x: samples (B, ...) in the scheduler's own variable, about to be denoised; the scheduler steps from what is here after the
            guidance was called.
        level: their noise level; `level.index` counts network evaluations, `level.order` is 2 in a corrector stage.
        levels: all levels of the run.
        cond: conditioning of the batch, or None.
        codec: latent codec, or None for a pixel-space model.
        seeds: seed of each sample, or None; for counter-based noise.
        scheduler: the scheduler, for reading.
        denoiser: for guidance that evaluates the network at site X; None where the pipeline itself calls the network.
        cache: scratch space shared by the guidances of a run, emptied at its start.
        log: figures worth reporting (a guidance's energy, ...), by name, for this evaluation.
        energy: the last log-potential (B,) of each energy so far, by name; of a sample that is not guided at present, that of when
            it last was, or NaN.
    """

    x: Tensor
    level: Level
    levels: list[Level]
    cond: Any = None
    codec: Any = None
    seeds: list[int] | None = None
    scheduler: Any = None
    denoiser: Any = None
    cache: dict[Any, Any] = dataclasses.field(default_factory=dict)
    log: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    energy: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def decode(self, x0: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of clean samples; a pixel-space model's samples are images."""
        return x0 if self.codec is None else self.codec.decode(x0)

    @property
    def progress(self) -> float:
        """Fraction of the run that is done before this evaluation, 0 to 1 (0 first, 1 last)."""
        return self.level.index / max(1, len(self.levels) - 1)
