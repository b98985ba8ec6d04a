"""Denoiser adapters, one for each model family, and exact analytic denoisers."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "base": ["Cond", "Denoiser"],
        "registry": ["find", "register"],
        "embeddings": ["Embeddings"],
        "analytic": ["GaussianDenoiser", "GaussianMixtureDenoiser", "LinearDenoiser"],
    },
)
