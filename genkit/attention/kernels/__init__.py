"""Triton kernels of attention that no library has: statistics in one pass, and forward-mode derivatives.

No GPU has run them yet. They are checked by Triton's interpreter on the CPU, and compiled for four architectures, with the
resources of each in lock.json (`genkit attention lock`). `genkit.attention.attend_probe` and `attend_jvp` choose them where they
run, and fused calls of torch elsewhere.
"""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "entry": ["attend_jvp", "attend_probe", "autocast"],
        "serving": ["unserved"],
    },
)
