"""Attention that is fused, and a run's proof of it."""

from genkit._lazy import lazy_exports

# Functions and the files that define them have different names: importing a submodule sets the package's attribute of its name.
__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "fused": ["attend"],
        "guard": ["strict"],
        "probe": ["Probe", "attend_probe"],
        "statistics": ["attention_kl", "log_sum_exp", "row_entropy", "row_statistic", "token_map"],
    },
)
