"""The `genkit` command: its subcommands and `--version`."""

from __future__ import annotations

from typing import Annotated

import typer

from genkit.cli.assemble import assemble
from genkit.cli.assemble_eval import assemble_eval
from genkit.cli.attention import attention
from genkit.cli.classify import classify
from genkit.cli.detect import detect
from genkit.cli.distill import distill
from genkit.cli.doctor import doctor
from genkit.cli.eval import evaluation
from genkit.cli.export import export
from genkit.cli.features import features
from genkit.cli.make_furniture import make_furniture
from genkit.cli.reproduce import reproduce
from genkit.cli.sample import sample
from genkit.cli.synth import synth
from genkit.cli.train import train
from genkit.cli.ui import ui
from genkit.cli.zoo import zoo

app = typer.Typer(
    name="genkit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 broken, 2 usage or bad input, 3 partly done, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import genkit

        typer.echo(f"genkit {genkit.__version__}")
        raise typer.Exit()


@app.callback()
def genkit(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Sample from pretrained diffusion models, steer them, and look after them.

    Embedded models work without a download:

        [bold]genkit sample "a red seven on a yellow background" --seeds 0-15[/bold]
    """


app.command()(sample)
app.command()(classify)
app.command()(detect)
app.command()(assemble)
app.command("assemble-eval")(assemble_eval)
app.command("make-furniture")(make_furniture)
app.command()(features)
app.command()(synth)
app.add_typer(train, name="train")
app.command()(distill)
app.command()(export)
app.add_typer(evaluation, name="eval", help="Measure a set of images; [bold]suite[/bold] measures the figures of the README again.")
app.add_typer(attention, name="attention")
app.add_typer(zoo, name="zoo")
app.command()(reproduce)
app.command()(doctor)
app.command()(ui)


def main() -> None:
    """Entry point of the `genkit` script."""
    app(prog_name="genkit")
