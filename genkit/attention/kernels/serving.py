"""Whether the kernels run on given tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from genkit.attention.kernels.tiles import HEAD_DIM_MAX, architecture

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the CPU. It reads the variable once, when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unserved(operator: str, q: Tensor, v: Tensor) -> str | None:
    """Why an operator's kernels do not run on these tensors, in a sentence; None where they do.

    Args:
        operator: "attend_probe" or "attend_jvp".
        q: (B, H, L, D).
        v: (B, H, S, E).

    Example:
        >>> unserved("attend_jvp", torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
        'The kernels run on CUDA devices, and these tensors are on cpu.'
    """
    width, device = q.shape[-1], "rocm" if torch.version.hip is not None and q.is_cuda else q.device.type
    dtype = str(q.dtype).removeprefix("torch.")
    if q.dtype not in DTYPES:
        return f"The kernels take float16, bfloat16 and float32, and q is {dtype}."
    if width > (most := HEAD_DIM_MAX[operator][q.dtype.itemsize]):
        return f"The kernels of {operator} take head dimensions up to {most} in {dtype}, and q {tuple(q.shape)} has {width}."
    if v.shape[-1] != width:
        return f"The kernels take values as wide as queries, and q {tuple(q.shape)} has {width}, v {tuple(v.shape)} {v.shape[-1]}."
    if interpreted():
        return None if device == "cpu" else f"Triton interprets on the CPU (TRITON_INTERPRET=1), and these tensors are on {device}."
    if device != "cuda":
        return f"The kernels run on CUDA devices, and these tensors are on {device}."
    try:  # last, since calls on a CPU need not wait for the import
        import triton  # noqa: F401
    except ImportError:
        return "The kernels need Triton, which is not installed (pip install triton)."
    major, minor = torch.cuda.get_device_capability(q.device)
    served = architecture(10 * major + minor) is not None
    return None if served else f"The kernels take compute capability 8.0 to 12.x, and this device has {major}.{minor}."
