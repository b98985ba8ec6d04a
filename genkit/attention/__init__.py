"""Attention that is fused, and a run's proof of it."""

from genkit._lazy import lazy_exports

# Functions and the files that define them have different names: importing a submodule sets the package's attribute of its name.
__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "guard": ["strict"],
    },
)
