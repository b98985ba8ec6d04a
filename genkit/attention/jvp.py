"""Attention's directional derivative (forward mode) without the matrix of probabilities, and by fused calls only.

    S = scale Q K^T + mask,          P = softmax(S),   O = P V
    tS = scale (tQ K^T + Q tK^T),    tO = P tV + (P o tS) V - rowsum(P o tS) O

On CUDA the Triton kernel computes O and tO in one pass (`genkit.attention.kernels`; no GPU has run it yet). Anywhere else two
calls of torch's fused attention do, by an identity: with queries [Q, 0], keys [K, V] and values [K, tK], attention's ordinary
backward at the output gradient [tQ, Q] gives

    dQ[D:] = scale sum_j P_ij ([tQ, Q]_i . [K, tK]_j - rowsum) V_j = (P o tS) V - rowsum(P o tS) O

The logits do not see V, which is multiplied by 0, but the gradient of the queries is a sum over keys that carry it. So a fused
backward is a fused forward derivative, at twice the head dimension.

torch's fused attention itself has no forward derivative (pytorch issues 116350, 117629), so consistency training (sCM: Lu and
Song 2024, arXiv 2410.11081;
MeanFlow: Geng et al. 2025, arXiv 2505.13447) turns fused attention off for it. `forward_mode()` keeps it: `torch.func.jvp` of a
    model, unchanged.

B batch, H heads, L queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from genkit.attention import kernels
from genkit.attention.shapes import check, check_tangents


def attend_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and its derivative in the direction (tq, tk, tv).

    The output is differentiable once in q, k and v as usual; the tangent is a constant, as sCM and MeanFlow want it.

    Args:
        q: (B, H, L, D).
        k, v: (B, H, S, D).
        tq, tk, tv: tangents, each of the shape and type of its primal.
        mask: (L|1, S) or (B|1, H|1, L|1, S): boolean (True attends), or of q's type and added to the logits; a constant.
        scale: of the logits; D ** -0.5 by default.

    Returns:
        Output and tangent, (B, H, L, D) each. A row that sees no key has 0 and 0.

    Raises:
        ValueError: shapes or types that do not fit.

    Example:
        >>> out, t_out = attend_jvp(q, k, v, torch.ones_like(q), torch.zeros_like(k), torch.zeros_like(v))
    """
    q, k, v, tq, tk, tv = kernels.autocast(q, k, v, tq, tk, tv)
    mask = check(q, k, v, mask)
    check_tangents(q=(q, tq), k=(k, tk), v=(v, tv))
    if kernels.unserved("attend_jvp", q, v) is None:
        return kernels.attend_jvp(q, k, v, tq, tk, tv, mask=mask, scale=scale)
    return by_algebra(q, k, v, tq, tk, tv, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def by_algebra(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`attend_jvp` by fused calls; what it is given has been checked."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with torch.no_grad():
        along_values = F.scaled_dot_product_attention(q, k, tv, attn_mask=mask, scale=scale)
        return out, along_values + _along_logits(q, k, v, tq, tk, mask, scale)


def _along_logits(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(P o tS) V - rowsum(P o tS) O, by the fused backward."""
    keys, values = torch.cat([k, v], -1), torch.cat([k, tk], -1)

    def attend(queries: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)

    pull = torch.func.vjp(attend, torch.cat([q, torch.zeros_like(q)], -1))[1]
    return pull(torch.cat([tq, q], -1))[0][..., q.shape[-1] :]


@contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` has a forward derivative, which is fused.

    For `torch.func.jvp` and `torch.autograd.forward_ad` around models as they are: calls whose inputs carry a tangent go to
    `attend_jvp`, all others are torch's own. Reverse mode works on the output, not on the tangent. Dropout, causal masks and
    grouped queries with a tangent are refused.

    Raises:
        ValueError: inside, a call of attention with a tangent that `attend_jvp` does not serve.

    Example:
        >>> with forward_mode():
        ...     velocity, derivative = torch.func.jvp(lambda x, t: unet(x, t, text).sample, (x, t), (dx, dt))
    """
    with _ForwardMode():
        yield


class _ForwardMode(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with its signature, of dual tensors."""
    primals, tangents = zip(*(_unpack(x) for x in (query, key, value)), strict=True)
    if all(tangent is None for tangent in tangents):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and _unpack(attn_mask)[1] is not None:
        raise ValueError("Fused attention has no forward derivative along its mask: compute the mask outside, or detach it.")
    if dropout_p or is_causal or enable_gqa:
        asked = f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}"
        raise ValueError(f"Fused attention has no forward derivative with {asked}: use eval mode, a mask, and expanded heads.")
    directions = [torch.zeros_like(x) if tangent is None else tangent for x, tangent in zip(primals, tangents, strict=True)]
    out, t_out = attend_jvp(*primals, *directions, mask=attn_mask, scale=scale)
    return forward_ad.make_dual(out, t_out)


def _unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    dual = forward_ad.unpack_dual(x)
    return dual.primal, dual.tangent
