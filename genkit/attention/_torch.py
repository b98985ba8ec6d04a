"""Every private touch point of torch's attention; `tests/genkit/test_attention_statistics.py` has a version test for each."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of the fused CPU operator, which `scaled_dot_product_attention` calls and keeps the latter to itself.

    It trusts its arguments (wrong shapes read foreign memory): check them before.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; the operator uses `out` only for the row sums of grad * out."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
    )
