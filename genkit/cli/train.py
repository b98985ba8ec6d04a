"""`genkit train`: train what guides or conditions a pretrained model."""

from __future__ import annotations

import typer

from genkit.cli.train_discriminator import discriminator
from genkit.cli.train_token import token

train = typer.Typer(no_args_is_help=True, help="Train what guides or conditions a pretrained model, which stays as it is.")
train.command()(discriminator)
train.command()(token)
