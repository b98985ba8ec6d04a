"""The kernels as functions: what callers write, turned into what the operators take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.attention.kernels import ops
from genkit.attention.shapes import check_keys


def attend_probe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | Sequence[int] | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention with its statistics in one pass over the keys; differentiable once in q, k and v.

    Args:
        q: (B, H, L, D): float16 or bfloat16 with D up to 256, float32 with D up to 64.
        k, v: (B, H, S, D), of the same type.
        keys: positions of selected keys, (J,) or one row an image (B, J).
        mask: (L|1, S) or (B|1, H|1, L|1, S): boolean (True attends), or of q's type and added to the logits; it gets no gradient.
        scale: of the logits; D ** -0.5 by default.

    Returns:
        Output (B, H, L, D) of q's type, and in float32 the log-sum-exp (B, H, L) of the logits, the entropy (B, H, L) of each row
        in nats, and the probabilities (B, L, J) of the selected keys, averaged over heads. A row that sees no key has output,
        entropy and map 0, and -inf.

    Raises:
        ValueError: shapes, types, or a device that the kernels do not serve.

    Example:
        >>> out, lse, entropy, heat = attend_probe(q, k, v, keys=[5, 7])
    """
    q, k, v = autocast(q, k, v)
    chosen = None if keys is None else check_keys(keys, k.shape[-2], len(q), q.device)
    return ops.attend_probe(q, k, v, mask, chosen, q.shape[-1] ** -0.5 if scale is None else scale)


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
    """Attention and its derivative in a direction, in one pass: the kernel of `genkit.attention.attend_jvp`, with its arguments.

    Head dimensions up to 128, in float32 up to 64.

    Raises:
        ValueError: shapes, types, or a device that the kernels do not serve.

    Example:
        >>> out, t_out = attend_jvp(q, k, v, tq, tk, tv)
    """
    q, k, v, tq, tk, tv = autocast(q, k, v, tq, tk, tv)
    out, t_out, _ = ops.attend_jvp(q, k, v, tq, tk, tv, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    return out, t_out


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention does it: inside `torch.autocast` all take its type, but for float64."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors)
