"""`genkit attention`: what a model's attention is computed with."""

from __future__ import annotations

import typer

from genkit.cli.attention_audit import audit

attention = typer.Typer(no_args_is_help=True, help="Check that attention is fused.")
attention.command()(audit)


@attention.callback()
def _group() -> None:
    """Keeps this a group of commands when there is only one."""
