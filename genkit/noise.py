"""Counter-based noise: (seed, stream) -> tensor, the same whatever the batch size, the order, the device or the process.

Every picture has its own seed; every use of randomness within a picture (initial noise, the sampler's noise, a guidance's
noise, noise to train on or to score with) its own stream. Of a seed, torch's CPU generator keeps the lowest 32 bits only (its
Mersenne Twister is initialised from one word), so the pair is mixed to 32 bits by a bijection of the seed: the seeds below 2^32
all give different noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL, SAMPLER, GUIDANCE, TRAINING, SCORING = range(5)  # streams
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def mix(seed: int, stream: int = 0) -> int:
    """A 32-bit hash of (seed, stream); neighbours are unrelated, and seeds below 2^32 never meet within a stream.

    The low half of the seed goes through MurmurHash3's finaliser (a bijection; Appleby 2011), after a key that SplitMix64 (Steele
    et al. 2014) makes of the high half and the stream.
    """
    high, low = (seed >> 32) & _MASK32, seed & _MASK32
    key = ((high + 1) * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) & _MASK64
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
    z = low ^ (key >> 32)
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & _MASK32
    z = ((z ^ (z >> 13)) * 0xC2B2AE35) & _MASK32
    return z ^ (z >> 16)


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
