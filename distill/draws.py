"""What a round of distillation looks at: rows of the data, levels, and noise, as functions of (seed, round, attempt) alone.

The noise of sample i of round k depends on i and k, not on which process or micro-batch it falls to, so a run is the same (to
rounding) on any number of processes, and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from genkit import noise as noises
from genkit.denoisers import Cond, Denoiser
from genkit.distill.config import DistillConfig
from genkit.distill.data import LatentDataset, batch_rows
from genkit.distill.masks import masked, random_masks
from genkit.distill.networks import condition_vector
from genkit.distill.samplers import LevelSampler, NoiseSampler
from genkit.ranks import Ranks

USES = 5  # noises of a round: the student's, real, fake, the teacher's, of the finite difference


@dataclasses.dataclass(frozen=True)
class Draw:
    """One micro-batch of a round.

    Args:
        x0: clean samples (B, c, h, w).
        student_cond: what the student is told.
        mask: (B, 1, h, w), 1 where the student paints; None where it makes the whole sample.
        cond, wrong: their conditions, and those of other samples (None where mismatched pairs are off).
        vector, wrong_vector: the same for heads, (B, D).
        u, eps: level and noise of the student's input.
        u_real, eps_real, u_fake, eps_fake: where the discriminator looks.
        u_teacher, eps_teacher: where the teacher looks at the student's samples.
        eps_perturb: noise of the finite difference.
    """

    x0: Tensor
    student_cond: Cond
    mask: Tensor | None
    cond: Cond
    wrong: Cond | None
    vector: Tensor
    wrong_vector: Tensor
    u: Tensor
    eps: Tensor
    u_real: Tensor
    eps_real: Tensor
    u_fake: Tensor
    eps_fake: Tensor
    u_teacher: Tensor
    eps_teacher: Tensor
    eps_perturb: Tensor


class Draws:
    """Draws the micro-batches of rounds.

    Args:
        data: latents with conditions.
        denoiser: the teacher, which makes conditions.
        config: batch size, levels, noise.
        ranks: the processes that share each batch.

    Raises:
        ValueError: a batch that the processes and micro-batches do not divide, or unpaired data where pairs are needed.
    """

    def __init__(self, data: LatentDataset, denoiser: Denoiser, config: DistillConfig, ranks: Ranks) -> None:
        parts = ranks.world * config.accumulation
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} is no multiple of {ranks.world} processes times {config.accumulation} "
                "micro-batches."
            )
        batch_rows(data, config.batch_size, config.seed, 0)  # refuses a batch that the data cannot fill
        # What is outside of a mask does not go with the noise that a sample came from, so inpainting has fresh noise.
        self.paired = config.reconstruction > 0 and config.task == "generate"
        if self.paired:
            data.noise([0])  # refuses data that holds no pairs
        self.data, self.denoiser, self.config, self.ranks = data, denoiser, config, ranks
        self.levels = LevelSampler(config.levels, config.level_probs, config.warmup_probs, config.warmup_steps)
        self.noise = NoiseSampler.parse(config.disc_noise)
        self.num_classes: int | None = getattr(denoiser, "num_classes", None)
        self.extra_channels = self._extra_channels()
        # Without conditions there is nothing to mismatch, and without a discriminator nobody to look.
        conditional = bool(data.condition(denoiser, [0]).without_concat().tensors)
        self.mismatched = config.mismatched and config.adversarial > 0 and conditional
        self._last: tuple[tuple[int, int, int], Draw] | None = None

    def __call__(self, step: int, micro: int = 0, attempt: int = 0) -> Draw:
        """Micro-batch `micro` of round `step` for this process; another `attempt` has other noise."""
        # Both phases of a round ask for the same draws.
        if self._last is None or self._last[0] != (step, micro, attempt):
            self._last = (step, micro, attempt), self._draw(step, micro, attempt)
        return self._last[1]

    def _draw(self, step: int, micro: int, attempt: int) -> Draw:
        config, total = self.config, self.config.batch_size
        rows = batch_rows(self.data, total, config.seed, step)
        generator = torch.Generator().manual_seed(noises.mix((config.seed << 32) + step, noises.TRAINING + 97 * attempt))
        u = self.levels.draw(total, step, generator)
        u_real, u_fake = self.noise.draw(total, generator), self.noise.draw(total, generator)
        if config.same_noise_level:
            u_fake = u_real
        u_teacher = 1 - torch.rand(total, dtype=torch.float64, generator=generator)
        mine = self.ranks.share(range(total))[micro :: config.accumulation]
        x0 = self.data.latents([rows[i] for i in mine]).to(self.denoiser.device)
        both = [rows[i] for i in mine] + ([rows[(i + 1) % total] for i in mine] if self.mismatched else [])
        cond = self.data.condition(self.denoiser, both)
        vector = self._vector(cond, x0)
        here, there = slice(len(mine)), slice(len(mine), None)
        eps_student, eps_real, eps_fake, eps_teacher, eps_perturb = self._normal(mine, x0, step, attempt)
        if self.paired:
            pure = (u[mine] >= 1).to(x0.device).reshape(-1, *[1] * (x0.ndim - 1))
            eps_student = torch.where(pure, self.data.noise([rows[i] for i in mine]).to(x0), eps_student)
        own = cond[here] if cond.tensors else cond
        mask = random_masks(mine, step, config.seed, x0.shape[-2:]).to(x0) if config.task == "inpaint" else None
        return Draw(
            x0, own if mask is None else masked(own, x0, mask, self.denoiser), mask, own.without_concat(),
            cond[there].without_concat() if self.mismatched else None, vector[here], vector[there],
            u[mine], eps_student, u_real[mine], eps_real, u_fake[mine], eps_fake, u_teacher[mine], eps_teacher, eps_perturb,
        )  # fmt: skip

    def _extra_channels(self) -> int:
        """Channels that the student's input has beyond the teacher's: a mask and the rest, or what the data concatenates."""
        concat = self.data.condition(self.denoiser, [0]).tensors.get("concat")
        if self.config.task == "inpaint":
            if concat is not None:
                raise ValueError("The data has a condition 'concat' of its own, for editing, so it cannot train task='inpaint'.")
            return 1 + self.data.shapes[0][0]
        return 0 if concat is None else concat.shape[1]

    def example(self) -> tuple[Tensor, Cond, Tensor]:
        """Of one sample of the data: latents, condition and vector, for the sizes of what is built for it."""
        x0, cond = self.data.latents([0]).to(self.denoiser.device), self.data.condition(self.denoiser, [0]).without_concat()
        return x0, cond, self._vector(cond, x0)

    def _vector(self, cond: Cond, x0: Tensor) -> Tensor:
        vector = condition_vector(cond, self.num_classes).to(x0.device)
        return vector if len(vector) else x0.new_zeros(len(x0), 0)

    def _normal(self, items: Sequence[int], x0: Tensor, step: int, attempt: int) -> tuple[Tensor, ...]:
        """Noises like x0, one for each use within a round, for items of its global batch."""
        key = noises.mix((self.config.seed << 32) + step, noises.TRAINING + 1 + 97 * attempt) << 32
        return noises.normal([key | i for i in items], (USES, *x0.shape[1:]), noises.TRAINING).to(x0).unbind(1)
