"""The noise levels of a student and of its discriminator, by the fraction u of the training time.

    x_u = alpha_u x0 + sigma_u eps,        u in (0, 1]

| schedule             | level at u                                                              |
|----------------------|-------------------------------------------------------------------------|
| variance preserving  | t = ceil(u T) - 1: u = 1, .75, .5, .25 are t = 999, 749, 499, 249 of 1000 |
| flow matching        | sigma = u, alpha = 1 - u, t = u T                                        |
| EDM                  | sigma = sigma_min^(1 - u) sigma_max^u                                    |

At u = 1 the input is pure noise, whatever alpha is there (Stable Diffusion's is 0.068): sampling starts from pure noise, so
training must too (zero terminal signal-to-noise ratio at the input; Sauer et al. 2023, arXiv 2311.17042, sec. 3.1). The network
is still told its last timestep and its output is read with that level's alpha and sigma, which is what a pipeline does.

Sampling in few steps renoises, as training does: x0 <- student(x_u, u), then x_u' <- alpha_u' x0 + sigma_u' eps with fresh noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit import _host
from genkit.levels import Level, training_level

Noise = Callable[[int], Tensor]


class Path:
    """Levels by fraction of the time of a scheduler's training.

    Args:
        scheduler: the model's own, of any supported family; the steps that it is set to do not matter.

    Example:
        >>> path = Path(pipe.scheduler)
        >>> x, level = path.add_noise(x0, eps, torch.tensor([1.0, 0.5]))
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def level(self, u: Tensor | Sequence[float] | float) -> Level:
        """The levels (B,) at fractions u, float64; one number gives one row.

        Raises:
            ValueError: a fraction that is not above 0 and at most 1.
        """
        u = torch.as_tensor(u, dtype=torch.float64).detach().cpu().reshape(-1)
        if bool(((u <= 0) | (u > 1)).any()):
            raise ValueError(f"Levels are fractions of the training time, above 0 and at most 1; got {u.min():g} to {u.max():g}.")
        continuous = _host.is_flow(self.scheduler) or self.scheduler.config.get("use_flow_sigmas")
        if continuous or _host.is_preconditioned(self.scheduler):
            return training_level(self.scheduler, u)
        count = len(_host.alphas_cumprod(self.scheduler))
        # A little less than u T, so that u = .75 is the level 749; the tolerance absorbs what float arithmetic makes of u T.
        t = (torch.ceil(u * count - 1e-6) - 1).clamp(min=0)
        return training_level(self.scheduler, (t + 0.5) / count)

    def add_noise(self, x0: Tensor, eps: Tensor, u: Tensor) -> tuple[Tensor, Level]:
        """Clean samples x0 (B, ...) at fractions u (B,) with noise eps (B, ...): the noisy samples, and their level."""
        level = self.level(u)
        pure = torch.as_tensor(u).cpu() >= 1
        # sqrt(alpha^2 + sigma^2) eps is what samplers start from; 1 eps for all but EDM.
        alpha = torch.where(pure, 0.0, torch.as_tensor(level.alpha))
        sigma = torch.where(pure, torch.as_tensor(level.norm), torch.as_tensor(level.sigma))
        return dataclasses.replace(level, alpha=alpha, sigma=sigma).diffuse(x0, eps), level


def steps_of(levels: Sequence[float], count: int) -> tuple[float, ...]:
    """The levels that a student of K `levels` visits in `count` steps: levels[floor(i K / count)].

    Raises:
        ValueError: no steps, or more than there are levels.
    """
    if not 1 <= count <= len(levels):
        raise ValueError(f"A student of {len(levels)} levels samples in 1 to {len(levels)} steps, not {count}.")
    return tuple(levels[i * len(levels) // count] for i in range(count))


def renoise(x0_of: Callable[[Tensor, Level], Tensor], path: Path, levels: Sequence[float], noise: Noise) -> Tensor:
    """The student's sampler: denoise, add fresh noise of the next level, repeat.

    Args:
        x0_of: `(x (B, ...), level) -> x0`, the student with its condition.
        levels: what is visited, see `steps_of`.
        noise: `step -> eps (B, ...)`, that of step 0 first.

    Returns:
        Clean samples x0 (B, ...).
    """
    x0 = torch.zeros_like(noise(0))
    for step, u in enumerate(levels):
        x, level = path.add_noise(x0, noise(step), torch.full((len(x0),), u, dtype=torch.float64))
        x0 = x0_of(x, level)
    return x0
