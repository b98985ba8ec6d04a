"""What the benchmarks time with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of a call on a GPU, CPU time on a CPU."""
    if not torch.cuda.is_available():
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start
