"""How sharp a network's attention is while it samples: the mean entropy of its rows, module by module and image by image.

H_i = -sum_j p_ij log p_ij, in nats: 0 if a query attends to one key, log S if to all S alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genkit.attention.statistics import row_entropy
from genkit.attention.watching import Attention, watching
from genkit.denoisers.base import Denoiser


class Sharpness:
    """Mean entropies of a run, filled while it is recorded; of joint attention, the image's queries count."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (B,) by module, where the network is: a copy to the CPU would let a GPU wait
        self._counts: dict[str, int] = {}
        self._keys: dict[str, int] = {}

    def of(self, image: int) -> dict[str, Any]:
        """For a side-car: `mean`, of entropy / log(keys) (0 to 1), and for each of `modules` `entropy` in nats and its `keys`."""
        modules = {
            name: {"entropy": round(float(total[image]) / self._counts[name], 5), "keys": self._keys[name]}
            for name, total in self._sums.items()
        }
        shares = [row["entropy"] / math.log(row["keys"]) for row in modules.values() if row["keys"] > 1]
        return {"mean": round(sum(shares) / len(shares), 5) if shares else None, "modules": modules}

    def observe(self, attention: Attention) -> None:
        """Count an attention call in."""
        with torch.no_grad():
            rows = row_entropy(attention.q, attention.k, mask=attention.mask, scale=attention.scale).mean((1, 2)).double()
        self._sums[attention.name] = self._sums.get(attention.name, 0) + rows
        self._counts[attention.name] = self._counts.get(attention.name, 0) + 1
        self._keys[attention.name] = attention.k.shape[2]


@contextmanager
def measure_sharpness(pipe: Any) -> Iterator[Sharpness]:
    """Within the block, sampling measures the entropy of its attention, at the cost of one more fused call for each.

    Evaluations of the null condition, and of models without a condition, are left out. Outputs keep their bits.

    Args:
        pipe: a `GuidedPipeline` or a denoiser.

    Example:
        >>> with measure_sharpness(pipe) as sharpness:
        ...     pipe("a red seven", seeds=[0])
        >>> sharpness.of(0)["mean"]
    """
    denoiser = pipe if isinstance(pipe, Denoiser) else pipe.denoiser
    sharpness = Sharpness()
    with watching(denoiser, sharpness.observe):
        yield sharpness
