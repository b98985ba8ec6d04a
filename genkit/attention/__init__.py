"""Attention that is fused, and a run's proof of it."""

from genkit._lazy import lazy_exports

# Functions and the files that define them have different names: importing a submodule sets the package's attribute of its name.
__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "auditing": ["audit"],
        "backends": ["use_attention", "why_unusable"],
        "folding": ["Evaluator", "evaluator"],
        "fused": ["attend"],
        "guard": ["AttentionLog", "jvp_fallback", "second_order", "strict"],
        "heatmaps": ["HeatMaps", "ImageMaps", "record"],
        "jvp": ["attend_jvp", "forward_mode"],
        "linting": ["Finding", "lint"],
        "probe": ["Probe", "attend_probe"],
        "report": ["AttentionReport", "ModuleAttention"],
        "sharpness": ["Sharpness", "measure_sharpness"],
        "statistics": ["attention_kl", "log_sum_exp", "row_entropy", "row_statistic", "token_map"],
    },
)
