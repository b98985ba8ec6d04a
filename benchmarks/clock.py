"""What the benchmarks time with, and what they say of the machine."""

from __future__ import annotations

import platform

import torch

from genkit.measuring import added_bytes, seconds

__all__ = ["added_bytes", "machine", "seconds"]


def machine(device: str = "cpu") -> dict[str, str]:
    """What a measurement ran on: the GPU's name, or the CPU's threads, and the versions of torch and Python."""
    cuda = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}
