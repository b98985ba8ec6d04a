"""`genkit reproduce`: the papers' headline figures, by the commands that make them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import BAD_INPUT, BROKEN, Debug, Json, Output, Quiet, command, option

if TYPE_CHECKING:
    from genkit.reproducing import Figure

_WHAT, _WHERE = "What is at hand", "Files"


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A figure, or a TOML file of one. Without it, all are listed.")
    ] = None,
    model: Annotated[str | None, option(_WHAT, "The checkpoint: a folder in diffusers' layout, or an embedded model.")] = None,
    data: Annotated[Path | None, option(_WHAT, "The folder of data that the figure describes.")] = None,
    out: Annotated[Path | None, option(_WHERE, "Folder for what the commands write.", show_default="reproduce/NAME")] = None,
    dry_run: Annotated[bool, option(_WHERE, "Print the commands and what is missing, and stop.", "--dry-run")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the papers' headline figures, or make one of them again.

    A figure names its source and how well its value is known, the checkpoint, the data, the commands and what they cost. With both
    at hand the commands run, and what comes out is compared: exit code 1 if it is outside the tolerance, 2 if something is missing.
    No figure of a full-size model has been run by this project yet.

    Examples:

        [bold]genkit reproduce[/bold]

        [bold]genkit reproduce diffusion-classifier-cifar10 --dry-run[/bold]

        [bold]genkit reproduce diffusion-classifier-cifar10 --model stable-diffusion-2-base --data cifar10[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit import reproducing

        if name is None:
            if model is not None or data is not None:
                raise ValueError(
                    "--model and --data are for one figure. Name it: genkit reproduce NAME (genkit reproduce lists them)."
                )
            _list(output, reproducing.figures())
            return
        figure = reproducing.read_figure(name)
        if model is not None:
            _check_checkpoint(model)
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"There is no folder {str(data)!r}. --data is {figure.data}.")
        work = out or Path("reproduce") / figure.name
        missing = figure.missing(model, data)
        document = {
            **_entry(figure),
            "commands": [["genkit", *line] for line in figure.lines(model, data, work)],
            "missing": missing,
        }
        if dry_run or missing:
            output.result(document, _described(figure, document))
            if missing and not dry_run:
                raise typer.Exit(BAD_INPUT)
            return
        from genkit.files import prepare_folder

        prepare_folder(work)
        document |= reproducing.reproduce(figure, model, data, work, lambda line: _run(line, output))
        output.result(document, _verdict(figure, document))
        if document["agrees"] is False:
            raise typer.Exit(BROKEN)


def _check_checkpoint(model: str) -> None:
    """Refuse what is no folder of a model before hours are spent; a point-cloud model has no model_index.json.

    Raises:
        ValueError, FileNotFoundError: no such model, or its folder is damaged.
    """
    from genkit import zoo
    from genkit.checkpoints import check_folder

    check_folder(zoo.folder(model), shapes=False)


def _run(line: Sequence[str], output: Output) -> str:
    """What a line of genkit prints on stdout, run as a process of its own.

    Raises:
        ValueError: it fails; its own message is on stderr.
        KeyboardInterrupt: it was interrupted.
    """
    import subprocess
    import sys

    from genkit.cli.common import INTERRUPTED

    output.note(f"genkit {shlex.join(line)}")
    done = subprocess.run([sys.executable, "-m", "genkit", *line], stdout=subprocess.PIPE, text=True)
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f"`genkit {' '.join(line[:2])} ...` failed with exit code {done.returncode}. Repeat when it is repaired.")
    return done.stdout


def _entry(figure: Figure) -> dict[str, Any]:
    """What `--json` says of a figure."""
    import dataclasses

    return {
        key: value for key, value in dataclasses.asdict(figure).items() if key not in ("commands", "classes", "result", "scale")
    }


def _list(output: Output, figures: Sequence[Figure]) -> None:
    lines = []
    for figure in figures:
        mark = "*" if figure.gap else "" if figure.value is not None else "-"
        value = "" if figure.value is None else f"{figure.value:g} {figure.unit}"
        lines.append(f"{figure.name:30s} {mark:1s} {value:12s} {figure.what}")
    notes = "* needs what genkit lacks or nobody published; - has no value to compare with. `genkit reproduce NAME` says more."
    output.result({"figures": [_entry(figure) for figure in figures]}, "\n".join([*lines, "", notes]))


def _described(figure: Figure, document: dict[str, Any]) -> str:
    lines = [f"{figure.system}: {figure.what}", f"  expected  {figure.expected}", f"  source    {figure.source}"]
    lines += [f"  evidence  {figure.evidence}", f"  GPU time  {figure.gpu_time}"]
    lines += [f"  caution   {figure.caution}"] if figure.caution else []
    lines += [f"  gap       {figure.gap}"] if figure.gap else []
    lines += ["  commands", *(f"    {shlex.join(line)[:2000]}" for line in document["commands"])]
    lines += ["  missing", *(f"    {text}" for text in document["missing"])] if document["missing"] else []
    return "\n".join(lines)


def _verdict(figure: Figure, document: dict[str, Any]) -> str:
    measured, agrees = document["measured"], document["agrees"]
    if measured is None:
        return f"{figure.name}: the commands ran; there is no figure to read from them. {figure.gap or figure.evidence}"
    told = f"{figure.name}: measured {measured:.4g} {figure.unit}, expected {figure.expected} ({figure.source})"
    return told + {True: ": within the tolerance.", False: ": OUTSIDE the tolerance.", None: ": nothing to compare with."}[agrees]
