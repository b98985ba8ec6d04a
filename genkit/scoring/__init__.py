"""Diffusion classifiers: losses of pairs of noise level and noise, and policies that find the best class with few of them."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "plan": ["PairPlan", "Pairs"],
        "losses": ["METRICS"],
        "scorer": ["Scorer"],
        "policy": ["Exhaustive", "FixedRounds", "Policy", "Request", "Round", "Verdict"],
        "race": ["Race"],
        "tree": ["Tree"],
        "taylor": ["Taylor"],
        "dive": ["Dive"],
        "limits": ["Within", "within"],
        "null": ["AgainstNull"],
        "named": ["POLICIES", "plan_policy"],
        "calibration": ["REDUCTIONS", "fit_temperature", "posterior", "reduce_prompts"],
    },
)
