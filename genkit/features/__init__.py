"""Features of frozen diffusion networks: named taps with early exit, an on-disk cache, heads and probes."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "cache": ["FeatureCache"],
        "extractor": ["FeatureExtractor", "FeatureInfo"],
        "heads": ["AttentionHead", "FeedbackHead", "LinearHead"],
        "probe": ["Probe", "ProbeConfig"],
        "training": ["train_probe"],
    },
)
