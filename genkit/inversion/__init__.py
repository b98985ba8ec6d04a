"""Discrete inversion: which class, prompt or layout explains a sample, found by descent through a conditional diffusion model."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "slots": ["ConditionSlot", "Free", "Slots", "TokenSlots", "Vocabulary"],
        "projectors": ["Gumbel", "Nearest", "Projector", "Softmax"],
        "terms": ["Batch", "DiffusionPrior", "Likelihood", "LogPrior", "Prior", "Term"],
        "query": ["Answer", "Query", "Search"],
        "descent": ["Descent", "Optimiser", "Stop"],
        "leaps": ["Leaps"],
        "layouts": ["LayoutSlots", "leave_one_out"],
        "inverter": ["Checkpoint", "DiscreteInverter", "Inversion"],
    },
)
