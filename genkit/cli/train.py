"""`genkit train`: train what guides or conditions a pretrained model, or learns from one, or a diffusion model that classifies."""

from __future__ import annotations

import typer

from genkit.cli.train_classifier_diffusion import classifier_diffusion
from genkit.cli.train_discriminator import discriminator
from genkit.cli.train_dreamteacher import dreamteacher
from genkit.cli.train_layout_prior import layout_prior
from genkit.cli.train_probe import probe
from genkit.cli.train_token import token

train = typer.Typer(no_args_is_help=True, help="Train what guides or conditions a pretrained model, or learns from one.")
train.command()(discriminator)
train.command()(token)
train.command()(probe)
train.command("classifier-diffusion")(classifier_diffusion)
train.command()(dreamteacher)
train.command("layout-prior")(layout_prior)
