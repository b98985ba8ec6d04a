"""Attention and its statistics together: output, log-sum-exp, row entropy, and the head-averaged map of some keys.

On a CUDA device Triton's `attend_probe` computes them in one pass (not run on a GPU yet); elsewhere algebra on fused calls does:

    out           one fused call
    LSE, entropy  one, with keys as values (`genkit.attention.statistics`); without entropy, LSE comes with the output
    map           p_ij = exp(s_ij - LSE_i) for the selected keys alone, (L, J) numbers a head
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genkit.attention import kernels
from genkit.attention.fused import attend
from genkit.attention.shapes import check, check_keys
from genkit.attention.statistics import Keys, entropy_and_lse


class Probe(NamedTuple):
    """What `attend_probe` returns.

    Args:
        out: attention's output (B, H, L, E); None if there were no values.
        lse: log-sum-exp of the logits (B, H, L), in nats.
        entropy: of each row (B, H, L), in nats; None if it was not wanted.
        map: attention to the selected keys (B, L, J), averaged over heads; None if there are none.
    """

    out: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    map: Tensor | None


def attend_probe(
    q: Tensor,
    k: Tensor,
    v: Tensor | None = None,
    keys: Keys | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    entropy: bool = True,
) -> Probe:
    """Softmax attention with its statistics; all of them differentiable, once.

    Args:
        q, k: queries (B, H, L, D) and keys (B, H, S, D).
        v: values (B, H, S, E), or None where the output is not wanted.
        keys: J positions of keys, or J for each sample (B, J), whose map is wanted.
        mask, scale: as of `genkit.attention.attend`; with `entropy`, see also `row_entropy`.
        entropy: whether the rows' entropy is wanted.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or keys out of range; the message names the shapes.

    Example:
        >>> out, lse, entropy, map_BLJ = attend_probe(q, k, v, keys=[1, 2])
    """
    values = k.detach() if v is None else v
    q, k, values = kernels.autocast(q, k, values)
    added = check(q, k, values, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen = None if keys is None else check_keys(keys, k.shape[2], len(k), k.device)
    if kernels.unserved("attend_probe", q, values) is None:
        out, lse, rows, heat = kernels.attend_probe(q, k, values, chosen, mask=added, scale=scale)
        probe = Probe(out, lse, rows if entropy else None, None if chosen is None else heat)
    else:
        probe = by_algebra(q, k, values, chosen, added, scale, entropy=entropy, output=v is not None)
    return probe if v is not None else probe._replace(out=None)


def by_algebra(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, mask: Tensor | None, scale: float, *, entropy: bool, output: bool
) -> Probe:
    """`attend_probe` by fused calls; what it is given has been checked.

    Args:
        output: whether the output is wanted.
    """
    out = rows = None
    if output or not entropy:
        out, lse = attend(q, k, v, mask=mask, scale=scale)
    if entropy:
        rows, lse = entropy_and_lse(q, k, mask, scale)
    return Probe(out, lse, rows, None if keys is None else _map(q, k, keys, lse, mask, scale))


def _map(q: Tensor, k: Tensor, keys: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """exp(s - LSE) (B, L, J) at the selected keys, averaged over heads."""
    rows = keys.expand(len(k), -1)  # (B, J)
    index = rows[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    logits = scale * (q.to(lse.dtype) @ k.gather(2, index).to(lse.dtype).transpose(-1, -2))
    if mask is not None:
        logits = logits + mask.expand(len(k), -1, -1, -1).gather(3, rows[:, None, None].expand(-1, *mask.shape[1:3], -1))
    empty = lse == float("-inf")
    return torch.exp(logits - lse.masked_fill(empty, float("inf"))[..., None]).mean(1)
