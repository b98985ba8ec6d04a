"""Every private touch point of torch's attention; `tests/genkit/test_attention_statistics.py` has a version test for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


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


@contextmanager
def kernels_in_order(*kernels: SDPBackend) -> Iterator[None]:
    """`sdpa_kernel` with some kernels, the first before the others, which leaves torch's own order as it was.

    That order has the unfused kernel before cuDNN's on all but the latest devices; and what `sdpa_kernel` puts back
    is the order of those kernels only that were allowed before.
    """
    order = torch._C._get_sdp_priority_order()
    try:
        with sdpa_kernel(list(kernels), set_priority=True):
            yield
    finally:
        torch._C._set_sdp_priority_order(order)
