"""`genkit attention`: what a model's attention is computed with."""

from __future__ import annotations

import typer

from genkit.cli.attention_audit import audit
from genkit.cli.attention_bench import bench
from genkit.cli.attention_lock import lock

attention = typer.Typer(no_args_is_help=True, help="Check that attention is fused, and what it costs.")
attention.command()(audit)
attention.command()(bench)
attention.command()(lock)
