"""Attention and its log-sum-exp by fused calls, both differentiable: what the statistics are made of.

    p_ij = exp(s_ij - LSE_i),   s = scale q k^T + mask,   out = p v,   LSE_i = log sum_j exp(s_ij)

With g = dLoss/dout and c = dLoss/dLSE, softmax's derivative is

    ds_ij = p_ij (g_i . v_j - g_i . out_i + c_i),

so a fused backward pass gives the gradient of LSE too if it is told g.out - c instead of g.out. It computes that number itself from
g and out; one more channel, in which g is 1, v is 0 and out is -c, does it. No L x S matrix is ever made.

On CPUs the fused operator returns the log-sum-exp. Elsewhere it comes out of `scaled_dot_product_attention` alone: give each row
one more key of logit r_i, and the attention that it gets is p_i0 = 1 / (1 + exp(LSE_i - r_i)). With r_i = sum_j p_ij s_ij, the
mean logit (one more call), LSE_i - r_i is the row's entropy, from 0 to log S, so nothing overflows:

    LSE_i = r_i + log(1 - p_i0) - log p_i0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from genkit.attention import _torch, kernels
from genkit.attention.shapes import check

_ALIGNMENT = 8  # channels: what fused CUDA kernels want in half precision; in float32 they want 4


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention, and the log-sum-exp of its logits.

    Args:
        q: queries (B, H, L, D).
        k: keys (B, H, S, D).
        v: values (B, H, S, E).
        mask: boolean (True attends) or added to the logits; (B|1, H|1, L|1, S) or (L|1, S). It gets no gradient.
        scale: of the logits, by default 1/sqrt(D).

    Returns:
        (output (B, H, L, E), log-sum-exp (B, H, L), in nats, float32 or wider). A row that attends to nothing has 0 and -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.

    Example:
        >>> out, lse = attend(q, k, v)
    """
    q, k, v = kernels.autocast(q, k, v)
    added = check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.device.type == "cpu":
        return _on_cpu(q, k, v, added, scale)
    return portable(q, k, v, added, scale)


def portable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` by `scaled_dot_product_attention` alone, on any device; what it is given has been checked."""
    width = aligned(max(q.shape[-1], v.shape[-1]))
    wide_q, wide_k, wide_v = (padded(x, width) for x in (q, k, v))
    out = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, mask, scale=scale)[..., : v.shape[-1]]
    wide_q, wide_k = (padded(x, aligned(x.shape[-1])) for x in (q, k))
    with torch.no_grad():
        means = F.scaled_dot_product_attention(wide_q, wide_k, wide_k, mask, scale=scale)
        # In the dtype of q, so that the logit is the number that is added back. (A finite mask's mean is left out: r is free.)
        reference = (wide_q * means).sum(-1, keepdim=True).to(q.dtype)
    width = aligned(q.shape[-1] + 1)
    queries = padded(torch.cat([q, reference], -1), width)
    keys = F.pad(k, (0, width - k.shape[-1], 0, 1))
    keys[..., -1, k.shape[-1]] = 1  # the logit of the last key is scale * reference
    values = torch.zeros_like(keys)
    values[..., :-1, 0] = 1
    values[..., -1, 1] = 1
    more = None if mask is None else F.pad(mask, (0, 1))
    masses = F.scaled_dot_product_attention(queries, keys, values, more, scale=scale)[..., :2].to(_wide(q))
    own, other = masses.unbind(-1)
    empty = own == 0
    lse = scale * reference[..., 0].to(_wide(q)) + torch.where(empty, 1, own).log() - other.log()
    return out, torch.where(empty, float("-inf"), lse)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    width = max(q.shape[-1], v.shape[-1])
    out, lse = _Attend.apply(padded(q, width), padded(k, width), padded(v, width), mask, scale)
    if mask is not None:  # the operator says 0 for a row that attends to nothing
        lse = torch.where((mask == float("-inf")).all(-1), float("-inf"), lse)
    return out[..., : v.shape[-1]], lse


class _Attend(Function):
    """Widths of q, k and v are one; the mask is a float or None."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _torch.attention_forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        if g is None:
            g = torch.zeros_like(out)
        width = q.shape[-1]
        if c is not None:
            g, out = torch.cat([g, torch.ones_like(g[..., :1])], -1), torch.cat([out, -c[..., None].to(out.dtype)], -1)
            q, k, v = (padded(x, width + 1) for x in (q, k, v))
        grads = _torch.attention_backward(g, q, k, v, out, lse, mask, ctx.scale)
        return *(grad[..., :width] for grad in grads), None, None


def aligned(width: int) -> int:
    """The number of channels, at least `width`, that fused kernels take on any device."""
    return -(-width // _ALIGNMENT) * _ALIGNMENT


def padded(x: Tensor, width: int) -> Tensor:
    """x with channels of zeros up to `width`, as fused kernels take it: they want the last dimension contiguous."""
    x = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums and logarithms are taken."""
    return torch.promote_types(x.dtype, torch.float32)
