"""Puts the discriminator of a run together: what it looks at, and its heads."""

from __future__ import annotations

from genkit import zoo
from genkit.denoisers import Denoiser
from genkit.distill.config import DistillConfig
from genkit.distill.discriminator import FeatureDiscriminator
from genkit.distill.draws import Draws
from genkit.distill.sources import FeatureSource, PixelEncoder, TeacherTaps

# Stages of the embedded classifiers whose features ADD's discriminator reads.
CLASSIFIER_TAPS = ("blocks.1", "blocks.2", "blocks.3")


def build_discriminator(draws: Draws, config: DistillConfig, source: FeatureSource) -> FeatureDiscriminator:
    """The discriminator of a configuration, on a source of features."""
    _, _, vector = draws.example()
    return FeatureDiscriminator(
        source,
        vector.shape[1] if "text" in config.disc_condition else 0,
        head=config.head,
        image_dim=source.channels[-1] if "image" in config.disc_condition else 0,
        width=config.head_width,
        spectral=config.spectral_norm,
    )


def feature_source(denoiser: Denoiser, draws: Draws, config: DistillConfig) -> FeatureSource:
    """The teacher's taps (LADD), or an image encoder's (ADD).

    Raises:
        ValueError: taps that the network does not have, an encoder that is unknown, or the judge as encoder.
    """
    if config.method == "ladd":
        taps = config.taps if isinstance(config.taps, str) else list(config.taps)
        x0, cond, _ = draws.example()
        return TeacherTaps(denoiser, taps, shape=x0.shape[1:], cond=cond)
    if config.encoder == "digits-judge":
        raise ValueError("encoder='digits-judge' measures students, so it may not train them. Use 'digits-classifier'.")
    if config.encoder in zoo.names():
        from genkit.classifiers import load_classifier

        classifier = load_classifier(config.encoder).to(denoiser.device)
        return PixelEncoder(classifier, denoiser.codec, _named(config, CLASSIFIER_TAPS), size=32, augment=config.augment)
    import timm

    if not timm.is_model(config.encoder):
        raise ValueError(f"Unknown encoder {config.encoder!r}: neither a model of timm nor an embedded classifier.")
    # With its pretrained weights.
    source = PixelEncoder.timm(config.encoder, denoiser.codec, _named(config, (2, 5, 8, 11)), augment=config.augment)
    source.encoder.to(denoiser.device)
    return source


def _named(config: DistillConfig, default: tuple[int | str, ...]) -> list[int | str]:
    """The taps of an encoder; `TAP_SETS` are for teachers, and mean the encoder's own default here."""
    return list(default if isinstance(config.taps, str) else config.taps)
