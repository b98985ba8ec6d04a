"""The names that `--attn` and `use_attention` take. Imports nothing heavy."""

from __future__ import annotations

import re

from genkit.errors import unknown

POLICIES = AUTO, STRICT = "auto", "strict"
KERNELS = ("flash", "efficient", "cudnn", "math")  # of scaled_dot_product_attention itself
CHOICES = {
    AUTO: "torch's own choice for each call; what is not fused is said, counted, and runs",
    STRICT: "the same, but attention that is not fused is an error",
    "flash": "torch's FlashAttention kernel and no other",
    "efficient": "torch's memory-efficient kernel and no other",
    "cudnn": "cuDNN's kernel and no other",
    "math": "the unfused one, for comparison",
    "xformers": "the xformers package",
    "varlen": "torch.nn.attention.varlen: padded keys are left out instead of masked",
    "hub:NAME": "a kernel of the Hub that diffusers knows, as hub:flash or hub:sage; it is downloaded and run",
}


def check_choice(name: str) -> str:
    """The name, in lower case.

    Raises:
        ValueError: no such choice.
    """
    name = name.lower()
    if name not in CHOICES and not re.fullmatch(r"hub:[a-z0-9_]+", name):
        raise unknown("attention", name, CHOICES)
    return name
