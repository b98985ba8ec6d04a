"""`genkit attention audit`: fused and unfused attention of a model, counted."""

from __future__ import annotations

from typing import Annotated

import typer

from genkit.cli.common import Debug, Json, Quiet, command


def audit(
    model: Annotated[str, typer.Option(help="An embedded model, or a folder.")] = "digits",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Count a model's attention calls: fused, unfused, unproven.

    Example:

        [bold]genkit attention audit --model digits[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug):
        raise ValueError("Not there yet.")
