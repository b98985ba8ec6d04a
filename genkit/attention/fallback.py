"""Notices where torch's attention falls back to its unfused path, and says why.

`scaled_dot_product_attention` (SDPA) chooses a kernel anew in each call. Where no fused one takes the call it runs
`aten::_scaled_dot_product_attention_math`, silently: matmul, softmax, matmul, with the whole L x S matrix in memory. While anyone
listens, that operator has a kernel of ours in front of its own, which reports the call and then runs the very same code. Watching

    costs nothing where attention is fused, sees through an inner sdpa_kernel(MATH), and changes no bit of the result.

It does not see attention that was written by hand, nor what is inside a compiled region: see `genkit.attention.auditing`.
"""

from __future__ import annotations

import dataclasses
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)

MATH = torch.ops.aten._scaled_dot_product_attention_math.default
# Every tensor but those of inference mode has its autograd key, also under no_grad.
_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "CPU", "CUDA", "XPU", "MPS")


@dataclasses.dataclass(frozen=True, eq=False)
class Fallback:
    """A call of SDPA that runs unfused: its arguments, queries (B, H, L, D), keys and values (B, H, S, D)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float

    def reason(self) -> str:
        """Why no fused kernel took the call, in words, with the shapes."""
        return f"{'; '.join(self._causes() or self._torch_says() or ['torch gives no reason'])} ({self._shapes()})"

    def _causes(self) -> list[str]:
        """The causes that can be told from the arguments, on any device."""
        q, k, v, mask = self.query, self.key, self.value, self.mask
        if not _enabled():
            return ["the code itself asks for the unfused kernel, as sdpa_kernel(SDPBackend.MATH) does"]
        causes = []
        if len({q.shape[:-2], k.shape[:-2], v.shape[:-2]}) > 1:
            causes.append("fused kernels do not broadcast over batch or heads: expand the smaller tensor")
        if len({q.dtype, k.dtype, v.dtype}) > 1:
            causes.append(f"the dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}")
        elif q.device.type == "cuda" and q.dtype == torch.float64:
            causes.append("no fused CUDA kernel takes float64")
        if mask is not None and mask.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu":
            causes.append("the mask wants a gradient: use no_grad, or requires_grad_(False) on its parameters")
        if self.dropout > 0 and q.device.type == "cpu":
            causes.append(f"the fused CPU kernel has no dropout, here {self.dropout:g}: use eval mode")
        if q.shape[-1] != v.shape[-1] and q.device.type == "cpu":
            causes.append(f"queries and values differ in head dimension, {q.shape[-1]} and {v.shape[-1]}: pad one with zeros")
        return causes

    def _torch_says(self) -> list[str]:
        """Torch's own reasons, which it gives as warnings to whoever allows fused kernels only."""
        mask = None if self.mask is None else self.mask.detach()
        with warnings.catch_warnings(record=True) as caught, sdpa_kernel(_enabled()), torch.no_grad():
            warnings.simplefilter("always")
            try:
                torch._fused_sdp_choice(self.query, self.key, self.value, mask, self.dropout)
            except RuntimeError as error:
                caught_error = str(error)
            else:
                caught_error = ""
        said = [re.sub(r"\s*\(Triggered internally.*", "", str(item.message), flags=re.DOTALL).strip() for item in caught]
        reasons = list(dict.fromkeys(text for text in said if text and not text.endswith("because:")))
        return reasons or ([caught_error] if caught_error and "No available kernel" not in caught_error else [])

    def _shapes(self) -> str:
        parts = [f"{name} {tuple(t.shape)}" for name, t in (("query", self.query), ("key", self.key), ("value", self.value))]
        if self.mask is not None:
            parts.append(f"mask {tuple(self.mask.shape)}")
        return f"{', '.join(parts)}, {str(self.query.dtype).removeprefix('torch.')} on {self.query.device.type}"


def _enabled() -> list[SDPBackend]:
    """The fused kernels that the code around allows."""
    cuda = torch.backends.cuda
    allowed = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled())
    return [backend for backend, is_allowed in zip(FUSED, allowed, strict=True) if is_allowed]


Listener = Callable[[Fallback], None]
_listeners: list[Listener] = []
_library: Any = None
_lock = threading.RLock()
_running: list[Fallback] = []  # whose unfused code runs at this moment


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` for each unfused call in the block, in this process, before it runs; what it raises is raised by the call.

    Like `sdpa_kernel` itself, it is for the whole process: backward passes recompute in threads of their own.
    """
    global _library
    with _lock:
        _listeners.append(listener)
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
            for key in _KEYS:
                _library.impl(MATH.overloadpacket.__name__, math, key)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(listener)
            if not _listeners:
                _library._destroy()
                _library = None


def running() -> Fallback | None:
    """The call whose unfused code runs at this moment."""
    return _running[-1] if _running else None


def math(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, *args: Any, **kw: Any) -> Any:
    """The kernel in front of `MATH`: report, then the operator's own code."""
    call = Fallback(query, key, value, mask, dropout)
    for listener in dict.fromkeys(_listeners):
        listener(call)
    _running.append(call)
    try:
        return MATH.decompose(query, key, value, mask, dropout, *args, **kw)
    finally:
        _running.pop()
