"""What noise a student starts from, and what noise its discriminator looks through: random fractions u of the training time.

    student        u in {u_1 = 1 > u_2 > ... > u_K}, with probabilities that may change after a warm-up
    discriminator  logit-normal:m,s         logit u ~ N(m, s^2)         (LADD: Sauer et al. 2024, arXiv 2403.12015; m = s = 1)
                   uniform, uniform:a,b     u ~ U(a, b)
                   shifted:k                u = k w / (1 + (k - 1) w), w ~ U(0, 1)         (Esser et al. 2024, arXiv 2403.03206)
                   atan-lognormal:m,s       tan t = e^P / sigma_d, P ~ N(m, s^2), u = sin t / (cos t + sin t)
                                            (SANA-Sprint: Chen et al. 2025, arXiv 2503.09641; m = -0.6, s = 1, sigma_d = 0.5)

A larger m judges the global structure of a picture, a smaller one its texture. The n draws of a batch fall one into each n-th of
the probability, in random order: each is distributed as if it were alone, and a batch varies less than independent draws do.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.errors import unknown

SIGMA_DATA = 0.5  # standard deviation of the data in TrigFlow


@dataclasses.dataclass(frozen=True)
class LevelSampler:
    """The levels of a student, and how often each is trained.

    Args:
        levels: fractions u of the training time, descending from 1, which is pure noise.
        probs: how often each is drawn, of any sum; uniform by default. LADD stresses one step with (.7, .1, .1, .1).
        warmup_probs: the same for the first `warmup_steps` steps. LADD: (0, 0, .5, .5) for 500.
        warmup_steps: length of the warm-up.

    Raises:
        ValueError: levels out of range, not descending or not starting at 1, or probabilities that do not fit.

    Example:
        >>> sampler = LevelSampler.parse("1,.75,.5,.25", "warmup:500:0,0,.5,.5;.7,.1,.1,.1")
        >>> sampler.draw(64, step, generator)       # (64,) float64
    """

    levels: tuple[float, ...]
    probs: tuple[float, ...] | None = None
    warmup_probs: tuple[float, ...] | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        shown = ",".join(f"{u:g}" for u in self.levels)
        if not self.levels or not all(0 < u <= 1 for u in self.levels):
            raise ValueError(f"Levels {shown or '(none)'}: each must be above 0 and at most 1, and there must be at least one.")
        if any(b >= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"Levels {shown} are not descending. Order them from noise to data, each once, as in 1,.75,.5,.25.")
        if self.levels[0] != 1:
            raise ValueError(f"Levels {shown} do not start at 1. Sampling starts at pure noise, so training must: put 1 first.")
        for name, probs in (("Probabilities", self.probs), ("Warm-up probabilities", self.warmup_probs)):
            if probs is not None:
                _check_probs(name, probs, len(self.levels))
        if self.warmup_steps < 0 or (self.warmup_steps > 0) != (self.warmup_probs is not None):
            raise ValueError(
                f"warmup_steps={self.warmup_steps} with warmup_probs={self.warmup_probs}: give a positive length and "
                "probabilities, or neither."
            )

    @classmethod
    def parse(cls, levels: str, probs: str | None = None) -> LevelSampler:
        """A sampler in words: "1,.75,.5,.25" and "P,P,P,P" or "warmup:STEPS:P,P,P,P;P,P,P,P"; P for P is uniform where left out.

        Raises:
            ValueError: text of another form, and as above.
        """
        if not probs or not probs.startswith("warmup"):
            return cls(_numbers("levels", levels), _numbers("level probabilities", probs) if probs else None)
        _, _, rest = probs.partition(":")
        steps, _, both = rest.partition(":")
        first, semicolon, second = both.partition(";")
        if not steps.isdigit() or not semicolon:
            raise ValueError(f"The level probabilities {probs!r} are not of the form warmup:STEPS:P,P,..;P,P,..")
        parts = [_numbers("level probabilities", part) for part in (second, first)]
        return cls(_numbers("levels", levels), parts[0], parts[1], int(steps))

    def probabilities(self, step: int) -> tuple[float, ...]:
        """How often each level is drawn at a step, with sum 1."""
        probs = self.warmup_probs if step < self.warmup_steps else self.probs
        if probs is None:
            probs = (1.0,) * len(self.levels)
        return tuple(p / sum(probs) for p in probs)

    def draw(self, count: int, step: int, generator: torch.Generator) -> Tensor:
        """Levels (count,) float64 of the batch of a step."""
        ends = torch.tensor(self.probabilities(step), dtype=torch.float64).cumsum(0)
        # The last one ends at 1 but for rounding, and a level without probability must not be hit by it.
        index = torch.searchsorted(ends / ends[-1], _strata(count, generator), right=True)
        return torch.tensor(self.levels, dtype=torch.float64)[index]


class NoiseSampler(ABC):
    """A distribution of fractions u in (0, 1); see the head of this file.

    Example:
        >>> NoiseSampler.parse("logit-normal:1,1").draw(64, generator)      # (64,) float64
    """

    @staticmethod
    def parse(text: str) -> NoiseSampler:
        """A distribution in words: "logit-normal:1,1", "uniform", "uniform:0,.75", "shifted:3", "atan-lognormal:-.6,1".

        Numbers that are left out have their defaults.

        Raises:
            ValueError: an unknown name, or numbers that do not fit.
        """
        name, _, rest = text.partition(":")
        if name not in DISTRIBUTIONS:
            raise unknown("noise distribution", name, DISTRIBUTIONS)
        kind = DISTRIBUTIONS[name]
        values = _numbers(name, rest) if rest else ()
        fields = dataclasses.fields(kind)
        if len(values) > len(fields):
            names = ", ".join(field.name for field in fields)
            raise ValueError(f"The noise distribution {text!r} has {len(values)} numbers, but {name} takes {names}.")
        return kind(*values)

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """The u below which a share p of the distribution lies."""

    @abstractmethod
    def cdf(self, u: Tensor) -> Tensor:
        """The share of the distribution below u in (0, 1)."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Fractions (count,) float64, each above 0 and below 1."""
        tiny = 1e-9
        return self.quantile(_strata(count, generator).clamp(tiny, 1 - tiny)).clamp(tiny, 1 - tiny)


@dataclasses.dataclass(frozen=True)
class LogitNormal(NoiseSampler):
    """logit u ~ N(mean, std^2)."""

    mean: float = 1.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal("logit-normal", self.mean, self.std)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))

    def cdf(self, u: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(u) - self.mean) / self.std)


@dataclasses.dataclass(frozen=True)
class Uniform(NoiseSampler):
    """u ~ U(low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"uniform:{self.low:g},{self.high:g} is no interval between 0 and 1. Give low < high.")

    def quantile(self, p: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * p

    def cdf(self, u: Tensor) -> Tensor:
        return ((u - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclasses.dataclass(frozen=True)
class Shifted(NoiseSampler):
    """A uniform fraction, shifted as flow-matching schedules are: k w / (1 + (k - 1) w)."""

    shift: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shifted:{self.shift:g}: the shift must be positive, as in shifted:3.")

    def quantile(self, p: Tensor) -> Tensor:
        return self.shift * p / (1 + (self.shift - 1) * p)

    def cdf(self, u: Tensor) -> Tensor:
        return u / (self.shift - (self.shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class AtanLogNormal(NoiseSampler):
    """TrigFlow times t = atan(e^P / sigma_d), P ~ N(mean, std^2), as rectified-flow times sin t / (cos t + sin t)."""

    mean: float = -0.6
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal("atan-lognormal", self.mean, self.std)

    def quantile(self, p: Tensor) -> Tensor:
        tangent = (self.mean + self.std * torch.special.ndtri(p)).exp() / SIGMA_DATA
        return tangent / (1 + tangent)

    def cdf(self, u: Tensor) -> Tensor:
        return torch.special.ndtr(((SIGMA_DATA * u / (1 - u)).log() - self.mean) / self.std)


DISTRIBUTIONS: dict[str, type] = {
    "logit-normal": LogitNormal,
    "uniform": Uniform,
    "shifted": Shifted,
    "atan-lognormal": AtanLogNormal,
}


def _strata(count: int, generator: torch.Generator) -> Tensor:
    """Numbers (count,) in [0, 1), float64, one in each of `count` equal parts, in random order."""
    inside = torch.rand(count, dtype=torch.float64, generator=generator)
    return (torch.randperm(count, generator=generator) + inside) / count


def _numbers(what: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"The {what} {text!r} are no numbers with commas between them.") from None


def _check_probs(name: str, probs: Sequence[float], count: int) -> None:
    shown = ",".join(f"{p:g}" for p in probs)
    if len(probs) != count:
        raise ValueError(f"{name} {shown}: there are {len(probs)} for {count} levels. Give one for each level.")
    if not all(0 <= p < math.inf for p in probs) or sum(probs) == 0:
        raise ValueError(f"{name} {shown}: none may be negative, and their sum must be positive.")


def _check_normal(name: str, mean: float, std: float) -> None:
    if not math.isfinite(mean) or not 0 < std < math.inf:
        raise ValueError(f"{name}:{mean:g},{std:g}: the mean must be finite and the standard deviation positive.")
