"""`genkit zoo`: the embedded models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genkit.cli.common import INTERRUPTED, Debug, Device, Json, Quiet, command

zoo = typer.Typer(no_args_is_help=True, help="List, show and train the embedded models.")


@zoo.command("list")
def list_models(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the embedded models: what each is, its size and its measured quality.

    Example:

        [bold]genkit zoo list[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from rich.table import Table

        from genkit import zoo as models

        entries = [_entry(name) for name in models.names()]
        table = Table("name", "what", "size", "quality", box=None, pad_edge=False)
        for entry in entries:
            table.add_row(entry["name"], entry["what"], f"{entry['bytes'] / 1e6:.1f} MB", _brief(entry["quality"]))
        nothing = "This installation carries no models. Train one: genkit zoo train digits --out DIR"
        output.result({"models": entries}, table if entries else nothing)


@zoo.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An embedded model, see `genkit zoo list`.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show a model's card: data, licence, training and measured quality.

    Example:

        [bold]genkit zoo show digits[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from rich.table import Table
        from rich.text import Text

        from genkit import zoo as models

        document = {**_entry(name), "folder": str(models.path(name)), **models.card(name)}
        table = Table(box=None, show_header=False, pad_edge=False)
        for key, value in document.items():
            # Text, not str: a card may hold [brackets], which rich would read as markup.
            table.add_row(Text(key, style="bold"), Text(_brief(value)))
        output.result(document, table)


@zoo.command()
def measure(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An embedded model, see `genkit zoo list`.")],
    count: Annotated[int, typer.Option(help="Number of pictures; the cards have 1000.", min=20)] = 1000,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure an embedded model's quality again, as its card has it.

    The independent judge reads the pictures; distances are to held-out real digits. Needs the data, which
    `pip install genkit-diffusion\\[train]` brings.

    Example:

        [bold]genkit zoo measure digits --count 200[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from rich.table import Table

        from genkit import zoo as models
        from genkit.zoo import quality

        models.path(name)  # an unknown name is the first thing to say
        figures = quality.measure(name, count)
        keys = list(dict.fromkeys(key for row in figures.values() for key in row))
        table = Table("what", *keys, box=None, pad_edge=False)
        for what, row in figures.items():
            table.add_row(what, *(f"{row[key]:.4g}" if key in row else "" for key in keys))
        output.result({"name": name, "count": count, "figures": figures}, table)


@zoo.command()
def train(
    name: Annotated[str, typer.Argument(metavar="NAME", help="digits, digits-classifier, digits-discriminator, ...")],
    out: Annotated[Path, typer.Option(help="Folder for the weights and for training/ (checkpoint and log).")],
    steps: Annotated[int | None, typer.Option(help="Length of the run.", show_default="that of the embedded model", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained, and stop.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an embedded model from scratch, as its embedded weights were.

    Needs the training data, which `pip install genkit-diffusion\\[train]` brings. Ctrl-C keeps a checkpoint.

    Example:

        [bold]genkit zoo train digits-classifier --out runs/digits-classifier[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit import zoo as models
        from genkit.cli.common import check_device, resolve_device
        from genkit.errors import unknown
        from genkit.files import prepare_folder

        if name not in models.TRAINABLE:
            raise unknown("model to train", name, models.TRAINABLE)
        check_device(device)
        document = {"name": name, "what": models.TRAINABLE[name], "folder": str(out), "steps": steps, "resume": resume}
        if dry_run:
            length = "as many steps as the embedded model" if steps is None else f"{steps:,} steps"
            output.result(document, f"Would train {name} ({models.TRAINABLE[name]}) for {length} into {out}.")
            return
        prepare_folder(out)
        try:
            _train(name, out, steps=steps, resume=resume, device=resolve_device(device))
        except KeyboardInterrupt:
            output.note("Interrupted. Repeat the command with --resume to go on from the last checkpoint.")
            output.result({**document, "interrupted": True})
            raise typer.Exit(INTERRUPTED) from None
        output.result(document, f"Trained {name}: {out}")


def _train(name: str, folder: Path, **arguments: Any) -> None:
    from importlib import import_module

    scripts = {
        "autoencoder": "autoencoder", "digits": "digits", "digits-turbo": "turbo", "digits-noisy-classifier": "noisy_classifier",
        "digits-discriminator": "discriminator", "scenes": "scenes", "scenes-prior": "layout_prior",
        "furniture": "furniture",
    }  # fmt: skip
    if name in scripts:
        import_module(f"genkit.zoo.training.{scripts[name]}").train(folder, **arguments)
    else:
        import_module("genkit.zoo.training.classifier").train(name, folder, **arguments)


def _entry(name: str) -> dict[str, Any]:
    """What `list` shows of a model."""
    from genkit import zoo as models

    card = models.card(name)
    what = card.get("what") or models.TRAINABLE.get(name, "")
    return {"name": name, "what": what, "bytes": models.size(name), "quality": card.get("quality", {})}


def _brief(value: Any) -> str:
    """A card's value in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_brief(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_brief(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
