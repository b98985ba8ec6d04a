"""Trainers of what guides: discriminators and class tokens."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "discriminator": ["DiscriminatorConfig", "train_discriminator"],
        "token": ["TokenTrainer"],
        "token_state": ["TokenConfig", "TrainedToken"],
    },
)
