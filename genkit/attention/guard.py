"""`strict()`: a fall-back to unfused attention is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@contextmanager
def strict() -> Iterator[None]:
    """Fused attention only, inside the block."""
    with sdpa_kernel(FUSED):
        yield
