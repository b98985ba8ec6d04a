"""Layouts: classes with boxes, and how a network is conditioned on them."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "layout": ["Layout", "pack", "unpack"],
        "grounding": ["Grounding"],
        "encoder": ["CODECS", "LayoutEncoder"],
        "prior": ["LayoutPrior"],
    },
)
