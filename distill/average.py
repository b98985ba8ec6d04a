"""The average of a student's weights, which is what is exported.

    s <- d s + (1 - d) w            d = min(decay, (1 + n) / (10 + n)) after update n + 1, and 0 after the first

(The warm-up is that of diffusers' EMAModel.) In host memory it costs the device nothing; a copy takes time there, so it may follow
only every k updates, with the product of their d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Average:
    """The average of some parameters over their updates.

    Args:
        parameters: those that are averaged, float32.
        decay: d, at least 0 and below 1.
        every: updates after which it follows.
        host: keep it in host memory, wherever the parameters are.

    Attributes:
        shadow: the average of each parameter.
        updates: of the parameters, so far.

    Example:
        >>> average = Average(student.parameters(), 0.999)
        >>> optimizer.step()
        >>> average.update(student.parameters())
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, *, every: int = 1, host: bool = False) -> None:
        self.decay, self.every, self.host, self.updates = decay, every, host, 0
        self.shadow: list[Tensor] = []
        self.reset(parameters)

    def reset(self, parameters: Iterable[Tensor]) -> None:
        """Set the average to the values of parameters."""
        self.shadow = [p.detach().to("cpu" if self.host else p.device, copy=True) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count an update of the parameters, and follow them where it is time to."""
        self.updates += 1
        if self.updates % self.every:
            return
        kept = math.prod(self.decay_of(n) for n in range(self.updates - self.every + 1, self.updates + 1))
        for s, p in zip(self.shadow, parameters, strict=True):
            s.lerp_(p.to(s.device), 1 - kept)

    def decay_of(self, update: int) -> float:
        """d of an update, counted from 1."""
        return min(self.decay, update / (9 + update)) if update > 1 else 0.0

    @torch.no_grad()
    def swap(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchange the values of the average and of the parameters; a second time puts both back."""
        for s, p in zip(self.shadow, parameters, strict=True):
            own = p.detach().to(s.device, copy=True)
            p.copy_(s)
            s.copy_(own)
