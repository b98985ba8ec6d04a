"""Measures of generated samples (distances, fidelity, diversity, accuracy, agreement with texts) and of detections."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "accuracy": ["accuracy", "class_balanced_accuracy", "group_accuracy", "worst_group_accuracy"],
        "attributes": ["attribute_accuracy"],
        "backbones": ["Backbone", "load_backbone"],
        "clip": ["clip_score"],
        "detection": ["average_precision"],
        "estimate": ["Estimate", "bootstrap_mean"],
        "evaluation": ["METRICS", "evaluate", "shortage"],
        "frechet": ["frechet_distance", "frechet_estimate"],
        "kernel": ["kernel_distance", "squared_mmd"],
        "manifold": ["Manifold", "manifold_metrics"],
        "reading": ["read_features"],
    },
)
