"""Noise levels: one parameterisation for every diffusers scheduler.

    x = alpha * x0 + sigma * eps          in the scheduler's own variable

| family                                    | alpha          | sigma             |
|-------------------------------------------|----------------|-------------------|
| DDPM, DDIM, PNDM, LCM, TCD, UnCLIP, ...   | sqrt(abar[t])  | sqrt(1 - abar[t]) |
| DPM++, UniPC, DEIS, SA                    | from the scheduler's own conversion of `sigmas[i]` |
| Euler, Heun, LMS, KDPM2, DPM-SDE, EDM     | 1              | sigmas[i]         |
| flow matching                             | 1 - sigmas[i]  | sigmas[i]         |

All of it is float64. Second-order schedulers evaluate the network twice a step; their levels follow suit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genkit import _host


@dataclasses.dataclass(frozen=True)
class Level:
    """A noise level: x = alpha * x0 + sigma * eps.

    Args:
        alpha, sigma: coefficients of signal and noise; floats, or float64 tensors (B,) for one level per sample.
        t: what the network is told: the scheduler's timestep.
        index: position in `scheduler.timesteps`.
        order: 1, or 2 where a second-order scheduler evaluates the network again within a step.
    """

    alpha: float | Tensor
    sigma: float | Tensor
    t: float | Tensor
    index: int = 0
    order: int = 1

    @property
    def norm(self) -> float | Tensor:
        """sqrt(alpha^2 + sigma^2): x / norm is the variance-preserving variable."""
        square = self.alpha**2 + self.sigma**2
        return square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)

    @property
    def log_snr(self) -> float | Tensor:
        """lambda = ln(alpha^2 / sigma^2)."""
        if isinstance(self.alpha, Tensor) or isinstance(self.sigma, Tensor):
            return 2 * (torch.as_tensor(self.alpha).log() - torch.as_tensor(self.sigma).log())
        return 2 * math.log(self.alpha / self.sigma)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Level:
        """Some of the levels of a batch; a number belongs to every row."""

        def pick(value: float | Tensor) -> float | Tensor:
            return value[rows] if isinstance(value, Tensor) and value.ndim else value

        return dataclasses.replace(self, alpha=pick(self.alpha), sigma=pick(self.sigma), t=pick(self.t))

    def diffuse(self, x0: Tensor, eps: Tensor) -> Tensor:
        """alpha * x0 + sigma * eps, for x0 and eps of shape (B, ...)."""
        return broadcast(self.alpha, x0) * x0 + broadcast(self.sigma, x0) * eps


def broadcast(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A per-sample value (B,) as (B, 1, ...) in the dtype and on the device of x; a number stays as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def levels_of(scheduler: Any) -> list[Level]:
    """The level of each entry of `scheduler.timesteps`, after `set_timesteps`.

    Raises:
        ValueError: `set_timesteps` was not called, or the scheduler belongs to no known family.

    Example:
        >>> scheduler.set_timesteps(30)
        >>> levels = levels_of(scheduler)
        >>> x = levels[0].diffuse(x0, noise)
    """
    if not _host.is_ready(scheduler):
        raise ValueError(f"{type(scheduler).__name__} has no timesteps yet. Call scheduler.set_timesteps(n) first.")
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(f"{type(scheduler).__name__} with invert_sigmas runs time backwards and is not supported. Switch it off.")
    timesteps = [t.item() for t in scheduler.timesteps]
    orders = _host.evaluation_orders(scheduler)
    sigmas = _host.evaluation_sigmas(scheduler)
    levels = []
    for i, t in enumerate(timesteps):
        if sigmas is not None:
            alpha, sigma = _host.alpha_sigma(scheduler, sigmas[i])
        else:
            abar = _host.alphas_cumprod(scheduler)[int(t)].double()
            alpha, sigma = abar.sqrt().item(), (1 - abar).sqrt().item()
        levels.append(Level(alpha, sigma, t, i, orders[i]))
    return levels


def training_level(scheduler: Any, u: Tensor | Sequence[float]) -> Level:
    """The levels (n,) at fractions u of the time that the network was trained on, whatever steps the scheduler is set to.

    | schedule                 | level at u                                                                         |
    |--------------------------|------------------------------------------------------------------------------------|
    | variance preserving      | t = min(floor(u T), T - 1), alpha = sqrt(abar[t]), sigma = sqrt(1 - abar[t])       |
    | flow matching            | sigma = u, alpha = 1 - u, t = u T: not shifted, which is a matter of sampling      |
    | EDM                      | sigma = sigma_min^(1 - u) sigma_max^u, alpha = 1                                   |

    A sigma-space scheduler (Euler, Heun, ...) gets variance-preserving levels too: the network is told the same.

    Args:
        u: from 0 (clean) to 1 (noise).

    Raises:
        ValueError: a fraction out of range, or a scheduler of no known family.

    Example:
        >>> level = training_level(pipe.scheduler, [0.1, 0.5])
        >>> x = level.diffuse(x0, noise)       # x0 and noise (2, C, h, w)
    """
    u = torch.as_tensor(u, dtype=torch.float64)
    if bool(((u < 0) | (u > 1)).any()):
        raise ValueError(f"Fractions of training time run from 0 to 1; got {u.min():g} to {u.max():g}.")
    config = scheduler.config
    if _host.is_flow(scheduler) or config.get("use_flow_sigmas"):
        return Level(1 - u, u, u * config.num_train_timesteps)
    if _host.is_preconditioned(scheduler):
        sigma = config.sigma_min ** (1 - u) * config.sigma_max**u
        return Level(torch.ones_like(sigma), sigma, scheduler.precondition_noise(sigma))
    abar = _host.alphas_cumprod(scheduler).detach().cpu().double()
    t = (u * len(abar)).long().clamp(max=len(abar) - 1)
    return Level(abar[t].sqrt(), (1 - abar[t]).sqrt(), t)


def kind_of(scheduler: Any) -> str:
    """What the network predicts under this scheduler: "eps", "x0", "v" or "flow".

    A preconditioned (EDM) network counts as "x0": its denoiser applies the preconditioning.

    Raises:
        ValueError: an unknown prediction type, or a velocity of one noise schedule on the other.
    """
    if _host.is_flow(scheduler):
        return "flow"
    if _host.is_preconditioned(scheduler):
        return "x0"
    name = scheduler.config.get("prediction_type", "epsilon")
    kinds = {"epsilon": "eps", "sample": "x0", "original_sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
    if name not in kinds:
        raise ValueError(f"Unknown prediction_type {name!r} of {type(scheduler).__name__}. Known: {', '.join(kinds)}.")
    flow_sigmas = bool(scheduler.config.get("use_flow_sigmas"))
    if kinds[name] == ("v" if flow_sigmas else "flow"):
        # diffusers computes something here, but no x0: each velocity belongs to its own schedule.
        raise ValueError(f"prediction_type {name!r} does not go with use_flow_sigmas={flow_sigmas} of {type(scheduler).__name__}.")
    return kinds[name]
