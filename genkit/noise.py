"""Counter-based noise: (seed, stream) -> tensor, the same whatever the batch size, the order, the device or the process.

Every picture has its own seed; every use of randomness within a picture (initial noise, the sampler's noise, a guidance's
noise) its own stream. The pair is mixed to a 64-bit state (SplitMix64, Steele et al. 2014) that seeds a CPU generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL, SAMPLER, GUIDANCE = range(3)  # streams
_MASK = (1 << 64) - 1


def mix(seed: int, stream: int = 0) -> int:
    """A 64-bit hash of (seed, stream); neighbours are unrelated."""
    z = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def generators(seeds: Sequence[int], stream: int = INITIAL) -> list[torch.Generator]:
    """A CPU generator for each seed; diffusers' `randn_tensor` takes the list as it is."""
    return [torch.Generator().manual_seed(mix(seed, stream)) for seed in seeds]


def normal(seeds: Sequence[int], shape: Sequence[int], stream: int = INITIAL) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU; row i depends on seeds[i] and the stream alone.

    Example:
        >>> torch.equal(normal([3, 7], (4, 8, 8))[1:], normal([7], (4, 8, 8)))
        True
    """
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators(seeds, stream)])
