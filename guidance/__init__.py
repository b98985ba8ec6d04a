"""Signals that steer sampling: energies, gradient routes, schedules, composition."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "base": ["Guidance", "Predict", "Scheduled", "State", "Sum"],
        "energy": ["EnergyGuidance"],
        "classifier": ["ClassifierEnergy", "ClassifierGuidance", "temperature_energy"],
        "elucd": ["EluCDDDPM", "EluCDEDM", "from_preset"],
        "activations": ["softplus_activations"],
        "registry": ["describe", "names", "parse"],
    },
)
