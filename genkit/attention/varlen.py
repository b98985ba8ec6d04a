"""SDPA's interface on `torch.nn.attention.varlen`: keys that a mask excludes are left out instead of computed and masked.

    (B, H, L, D) queries, (B, H, S, D) keys  ->  packed (B L, H, D) and (sum of lengths, H, D), with the places where samples start

It serves ragged text: a mask over keys, the same for all queries and heads. CUDA only; no GPU has run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

_LEFT_OUT = -5000.0  # diffusers leaves keys out with -10,000


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention (B, H, L, D), as `scaled_dot_product_attention` has it.

    Args:
        query, key, value: (B, H, L, D), (B, H, S, D), (B, H, S, D).
        attn_mask: (B | 1, 1, 1, S), bool or additive; or of L rows and H heads that are all alike.
        kernel: the packed attention; `torch.nn.attention.varlen.varlen_attn` by default.

    Raises:
        ValueError: dropout, grouped queries, other shapes, or a mask that is none over keys.
    """
    if query.ndim != 4 or dropout_p or enable_gqa or query.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"varlen attention takes queries (B, H, L, D) and keys (B, H, S, D) without dropout and grouped queries; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, dropout {dropout_p:g}. Use --attn auto."
        )
    if kernel is None:
        from torch.nn.attention.varlen import varlen_attn

        kernel = cast("Callable[..., Tensor]", varlen_attn)
    batch, _, length, _ = query.shape
    kept = _kept_keys(attn_mask, batch, key.shape[2], key.device)
    lengths = kept.sum(1, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * length
    key_starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    q = query.transpose(1, 2).flatten(0, 1)
    k, v = (tensor.transpose(1, 2)[kept] for tensor in (key, value))
    options: dict[str, Any] = {"window_size": (-1, 0)} if is_causal else {}
    if scale is not None:
        options["scale"] = scale
    out = kernel(q, k, v, starts, key_starts, length, int(lengths.max()), **options)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def _kept_keys(mask: Tensor | None, batch: int, keys: int, device: torch.device) -> Tensor:
    """(B, S), True for keys that take part."""
    if mask is None:
        return torch.ones(batch, keys, dtype=torch.bool, device=device)
    kept = mask if mask.dtype == torch.bool else mask > _LEFT_OUT
    kept = kept.reshape(*[1] * (4 - kept.ndim), *kept.shape)
    first = kept[:, :1, :1]
    additive = mask.dtype != torch.bool and bool(((mask != 0) & (mask > _LEFT_OUT)).any())
    if additive or kept.shape[-1] != keys or not bool((kept == first).all()) or not bool(first.any(-1).all()):
        raise ValueError(
            "varlen attention takes a mask that leaves keys out, the same for all queries and heads, and not all keys of a sample; "
            f"this one is {tuple(mask.shape)}. Use --attn auto."
        )
    return first[:, 0, 0].expand(batch, keys)
