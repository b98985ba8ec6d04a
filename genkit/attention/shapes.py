"""Checks of what attention is given; the errors name the shapes.

B batch, H heads, L queries, S keys, D width of queries and keys, E width of values, J selected keys
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSE: Tensor | None = None, mask: Tensor | None = None) -> Tensor | None:
    """Check that queries, keys, values and mask fit together.

    Args:
        mask: boolean (True attends) or of the dtype of q and added to the logits; (B|1, H|1, L|1, S) or (L|1, S).

    Returns:
        The mask as it is added to the logits, (B|1, H|1, L|1, S), or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message names them.
    """
    given = {"q (B, H, L, D)": q_BHLD, "k (B, H, S, D)": k_BHSD} | ({} if v_BHSE is None else {"v (B, H, S, E)": v_BHSE})
    for name, tensor in given.items():
        if tensor.ndim != 4 or not tensor.numel():
            problem = "is empty" if tensor.ndim == 4 else "has the wrong rank"
            raise ValueError(
                f"{name} {problem}: its shape is {tuple(tensor.shape)}. Attention takes four dimensions of at least 1."
            )
    listed = ", ".join(f"{name} = {tuple(tensor.shape)}" for name, tensor in given.items())
    pairs = [
        ("B", q_BHLD.shape[0], k_BHSD.shape[0]),
        ("H", q_BHLD.shape[1], k_BHSD.shape[1]),
        ("D", q_BHLD.shape[3], k_BHSD.shape[3]),
    ]
    if v_BHSE is not None:
        pairs += [(axis, k_BHSD.shape[i], v_BHSE.shape[i]) for i, axis in enumerate("BHS")]
    for axis, first, second in pairs:
        if first != second:
            advice = "Use expand for a shared batch or head." if 1 in (first, second) and axis in "BH" else "They must agree."
            raise ValueError(f"{axis} is {first} and {second} in {listed}. {advice}")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in given.values()}
    if len(dtypes) > 1 or not q_BHLD.is_floating_point():
        each = ", ".join(f"{name[0]} is {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in given.items())
        raise ValueError(f"Attention needs one floating dtype, but {each}. Cast them with .to(dtype).")
    devices = {str(tensor.device) for tensor in (*given.values(), *(() if mask is None else (mask,)))}
    if len(devices) > 1:
        raise ValueError(f"Queries, keys, values and mask are on {' and '.join(sorted(devices))}. Move them to one device.")
    return None if mask is None else _added(mask, q_BHLD, k_BHSD.shape[2])


def check_keys(keys: Sequence[int] | Sequence[Sequence[int]] | Tensor, count: int, batch: int, device: torch.device) -> Tensor:
    """Positions of selected keys as a tensor (J,) or (B, J) of whole numbers from 0.

    Args:
        keys: J positions for all samples, or B rows of J; negative ones count from the end.
        count: S, the number of keys there are.

    Raises:
        ValueError: no keys, keys that are not whole numbers, of another batch size, or out of range.
    """
    chosen = torch.as_tensor(keys)  # checked where it is: a list costs a GPU no wait
    if chosen.ndim not in (1, 2) or not chosen.numel() or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ValueError(f"keys must be whole numbers, (J,) or (B, J) with at least one; got {_shown(chosen)}.")
    if chosen.ndim == 2 and len(chosen) != batch:
        raise ValueError(
            f"keys (B, J) are {tuple(chosen.shape)}, but the batch is {batch}. Give one row for each sample, or (J,) for all."
        )
    low, high = int(chosen.min()), int(chosen.max())
    if low < -count or high >= count:
        wrong = high if high >= count else low
        raise ValueError(f"Key {wrong} is out of range: there are S = {count} keys. Use 0 to {count - 1}, or -{count} to -1.")
    return (chosen % count).to(device)


def check_tangents(**pairs: tuple[Tensor, Tensor]) -> None:
    """Check that tangents are as their primals.

    Args:
        pairs: (primal, tangent) by the primal's name.

    Raises:
        ValueError: one has another shape or dtype; the message names both.
    """
    for name, (primal, tangent) in pairs.items():
        if (tangent.shape, tangent.dtype) != (primal.shape, primal.dtype):
            raise ValueError(f"The tangent of {name} must be like {name}, {_shown(primal)}; it is {_shown(tangent)}.")


def _added(mask: Tensor, q_BHLD: Tensor, count: int) -> Tensor:
    """The mask as it is added to the logits, in four dimensions."""
    batch, heads, rows, _ = q_BHLD.shape
    expected = f"(B|1, H|1, L|1, S) or (L|1, S) with B, H, L, S = {batch}, {heads}, {rows}, {count}"
    if mask.ndim not in (2, 4):
        raise ValueError(f"The mask has the wrong rank: its shape is {tuple(mask.shape)}. It must be {expected}.")
    mask = mask[None, None] if mask.ndim == 2 else mask
    fits = all(size in (1, full) for size, full in zip(mask.shape, (batch, heads, rows), strict=False))
    if not fits or mask.shape[3] != count:
        raise ValueError(f"The mask's shape {tuple(mask.shape)} does not fit: it must be {expected}.")
    if mask.requires_grad:
        raise ValueError("The mask requires a gradient, which fused attention does not give. Detach it.")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q_BHLD.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    if mask.dtype != q_BHLD.dtype:
        raise ValueError(f"The mask is {mask.dtype}, but q is {q_BHLD.dtype}. Give a boolean mask, or one of the dtype of q.")
    return mask if mask.stride(-1) == 1 else mask.contiguous()  # as fused CUDA kernels want it


def _shown(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
