"""DreamTeacher's teacher: a frozen diffusion network's features of real pictures, level by level.

    stochastic   x_t = alpha_t x0 + sigma_t eps, with fresh eps                   one pass, up to the deepest tap
    ddim         x_{k+1} = alpha_{k+1} x0^ + sigma_{k+1} eps^, from x_0 = x0      n passes and one (Song et al., arXiv 2010.02502)

and f^g = activations at (x_t, t). Of pictures that the teacher itself has drawn (`genkit synth`) the features are found likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.denoisers import Cond, Denoiser
from genkit.distill.path import Path
from genkit.distill.resident import in_dtype, without_encoders
from genkit.distill.sources import TeacherTaps
from genkit.features.extractor import FeatureExtractor, null_condition
from genkit.features.taps import blocks_of, taps_of
from genkit.levels import broadcast


class TeacherLevels:
    """Features of a frozen denoiser at noised samples, under its null condition.

    Args:
        denoiser: the teacher; it stays as it is.
        taps: places in the network, see `genkit.features.taps`.
        t: timesteps of the noise; of several, each sample gets one at random.
        encoding: "stochastic" or "ddim".
        ddim_steps: passes of the ddim encoding.
        bf16: compute in bfloat16.

    Attributes:
        shapes: (C, h, w) of each tap for the model's own size, found without computation.

    Raises:
        ValueError: a tap that the network does not have, or that gives no map; a time out of range; several for ddim.

    Example:
        >>> teacher = TeacherLevels(pipe.denoiser, ["block.6", "block.8"], t=[50])
        >>> teacher(x0, generator)["block.6"]       # (B, 128, 4, 4), x0 as `denoiser.encode` gives it
    """

    def __init__(
        self,
        denoiser: Denoiser,
        taps: Sequence[str | int],
        t: Sequence[int] = (50,),
        *,
        encoding: str = "stochastic",
        ddim_steps: int = 10,
        bf16: bool = False,
    ) -> None:
        if encoding == "ddim" and len(t) != 1:
            raise ValueError(f"The ddim encoding goes to one timestep, but t={tuple(t)} has {len(t)}. Give one.")
        info = FeatureExtractor(denoiser, taps, t=list(t)).feature_info
        flat = [f"{entry.name} {entry.shape}" for entry in info if len(entry.shape) != 3]
        if flat:
            raise ValueError(f"Distillation needs maps (C, h, w), but these taps give none: {', '.join(flat)}. Name others.")
        self.shapes: dict[str, tuple[int, ...]] = {entry.name: entry.shape for entry in info}
        self.null = null_condition(denoiser)
        self.t, self.encoding, self.ddim_steps = tuple(t), encoding, ddim_steps
        self.denoiser = in_dtype(without_encoders(denoiser, text=False, pictures=False), torch.bfloat16 if bf16 else None)
        self.source = TeacherTaps(self.denoiser, taps, cond=self.null)
        if encoding == "stochastic":
            self.denoiser = self.source.strip()

    @torch.no_grad()
    def __call__(self, x0: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Maps (B, C, h, w), float32, of clean samples x0 (B, ...), by the names of the taps.

        Args:
            generator: on the CPU, of noise and times.
        """
        count = self.denoiser.pipe.scheduler.config.num_train_timesteps
        chosen = torch.tensor(self.t)
        if len(self.t) > 1:
            chosen = chosen[torch.randint(len(self.t), (len(x0),), generator=generator)]
        u = (chosen.double() + 0.5) / count
        cond = self.null.repeat(len(x0))
        # The network has its own precision, whatever the student is trained in.
        with torch.autocast(x0.device.type, enabled=False):
            if self.encoding == "ddim":
                eps = ddim_noise(self.denoiser, self.source.path, x0, float(u), cond, self.ddim_steps)
            else:
                eps = torch.randn(x0.shape, generator=generator).to(x0)
            found = self.source(x0, cond, u.expand(len(x0)), eps)
        return dict(zip(self.shapes, found, strict=True))


def ddim_noise(denoiser: Denoiser, path: Path, x0: Tensor, u: float, cond: Cond, steps: int) -> Tensor:
    """eps (B, ...) with which x0 noised to the fraction u of the time is what the sampling ODE, run backwards, makes of it."""
    count = denoiser.pipe.scheduler.config.num_train_timesteps
    x, level = x0, path.level(1 / count)
    x = broadcast(level.alpha, x) * x
    for k in range(1, steps + 1):
        prediction = denoiser(x, level, cond)
        level = path.level(1 / count + (u - 1 / count) * k / steps)
        x = level.diffuse(prediction.x0, prediction.eps)
    return (x - broadcast(level.alpha, x) * x0) / broadcast(level.sigma, x)


def decoder_taps(denoiser: Denoiser, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """The last block of each resolution of a UNet's decoder, before its up-sampling, whose maps are of one of the sizes (h, w).

    In ADM-256, with the sizes of a backbone's C2 to C5, these are the paper's decoder blocks 3, 6, 9 and 12: maps of 8, 16, 32 and
    64 steps. Of a transformer, the block at two thirds of the depth.

    Raises:
        ValueError: there is none.
    """
    network = denoiser.network
    known = taps_of(network)
    ends = [f"up.{i}.pre" for i in range(len(getattr(network, "up_blocks", ())))]
    names = [*ends[:-1], ends[-1].removesuffix(".pre")] if ends else blocks_of(network)[(2 * len(known)) // 3 :][:1]
    if not names:
        raise ValueError(f"{type(network).__name__} has no blocks that genkit knows. Name taps by their module paths.")
    info = FeatureExtractor(denoiser, names).feature_info
    found = [entry.name for entry in info if entry.shape[1:] in sizes]
    if not found:
        gives = ", ".join(f"{entry.name} {' x '.join(map(str, entry.shape[1:]))}" for entry in info)
        there = ", ".join(f"{h} x {w}" for h, w in sizes)
        raise ValueError(
            f"None of the teacher's maps ({gives}) is as large as one of the backbone's ({there}). "
            "Give the backbone pictures of another size, or name taps."
        )
    return found
