"""Signals that steer sampling: energies, gradient routes, schedules, composition."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "base": ["Guidance", "Scheduled", "Sum"],
        "state": ["Predict", "State"],
        "attachment": ["attach"],
        "attend": ["AttendAndExcite"],
        "energy": ["EnergyGuidance", "as_guidance"],
        "guider": ["as_guider"],
        "classifier": ["ClassifierEnergy", "ClassifierGuidance", "temperature_energy"],
        "elucd": ["EluCDDDPM", "EluCDEDM", "from_preset"],
        "activations": ["softplus_activations"],
        "clip": ["ClipEnergy", "ClipGuidance"],
        "discriminator": ["Boosting", "Discriminator", "DiscriminatorGuidance", "load_discriminator"],
        "noisy_classifier": ["NoisyClassifier", "NoisyClassifierGuidance", "load_noisy_classifier"],
        "recurrence": ["Recurrent"],
        "schedules": ["below", "between", "cosine", "linear", "sine", "within"],
        "registry": ["describe", "names", "parse", "register_guidance"],
    },
)
