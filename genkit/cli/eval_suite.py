"""`genkit eval suite`: the figures of the README, measured again, against their recorded intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import BROKEN, PARTLY, Debug, Json, Output, Quiet, command, option

if TYPE_CHECKING:
    from genkit.suite import Figure, Suite

_WHAT, _WHERE = "What to measure", "Files"


def suite(
    only: Annotated[
        list[str] | None,
        option(_WHAT, "Figures whose name or command contains this. Repeat it for several.", show_default="all"),
    ] = None,
    recorded: Annotated[
        bool, option(_WHAT, "Measure nothing: check what is recorded, and that README and pages show it.", "--recorded")
    ] = False,
    folder: Annotated[
        list[str] | None, option(_WHAT, "NAME=DIR: data or a model that a command needs and the project does not carry.")
    ] = None,
    checkout: Annotated[Path | None, option(_WHERE, "The project's checkout.", show_default="that around this folder")] = None,
    out: Annotated[Path | None, option(_WHERE, "Folder that keeps each command's JSON.", show_default="a temporary one")] = None,
    resume: Annotated[bool, option(_WHERE, "Do not run commands again whose JSON is in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Print the commands that would run, and stop.", "--dry-run")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the figures of the README again.

    Runs the command of each figure in a checkout of the project, and compares the value with its recorded interval. Exit code 1 if
    one lies outside, 3 if a command could not run. Hours in all; name some of them with [bold]--only[/bold]. The table is
    benchmarks/suite.json, which says what each interval means.

    Examples:

        [bold]genkit eval suite --only turbo --out measured --resume[/bold]

        [bold]genkit eval suite --recorded --json[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.suite import Suite, find_checkout

        table = Suite.load(find_checkout(checkout))
        figures, folders = table.chosen(only or []), _folders(folder or [])
        if resume and out is None:
            raise ValueError("--resume needs the folder of the interrupted run. Name it: --out DIR.")
        if dry_run:
            names = list(dict.fromkeys(figure.command for figure in figures))
            lines = [f"{name}: {table.commands[name].run}" for name in names]
            output.result({"commands": {name: table.commands[name].run for name in names}}, "\n".join(lines))
            return
        if recorded:
            values, problems = {figure.name: table.recorded(figure) for figure in figures}, _not_shown(table, figures)
        else:
            values, problems = _measure(table, figures, folders, out, resume, output)
        for problem in problems:
            typer.echo(f"Error: {problem}", err=True)
        rows = [figure.row(values[figure.name]) for figure in figures if figure.name in values]
        output.result({"rows": rows}, _rich(table, figures, values))
        if not all(row["ok"] for row in rows) or (recorded and problems):
            raise typer.Exit(BROKEN)
        if problems:
            raise typer.Exit(PARTLY)


def _folders(given: list[str]) -> dict[str, str]:
    """The folders of NAME=DIR, by name.

    Raises:
        ValueError: not NAME=DIR, or no folder.
    """
    found = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or not Path(place).is_dir():
            raise ValueError(f"--folder {text!r} is not NAME=DIR with a folder that is there.")
        found[name] = str(Path(place).resolve())
    return found


def _not_shown(table: Suite, figures: list[Figure]) -> list[str]:
    """Recorded values that no document shows as the table says."""
    text = table.documents()
    found = []
    for figure in figures:
        for shown in (" ".join(shown.split()) for shown in figure.texts(table.recorded(figure))):
            if shown not in text:
                found.append(f"{figure.name}: neither the README nor a page has {shown!r}.")
    return found


def _measure(
    table: Suite, figures: list[Figure], folders: dict[str, str], out: Path | None, resume: bool, output: Output
) -> tuple[dict[str, float], list[str]]:
    """Values by figure, and why others have none."""
    import tempfile

    from genkit.files import prepare_folder

    values: dict[str, float] = {}
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if out is None else out.resolve()
        prepare_folder(place)
        for name in dict.fromkeys(figure.command for figure in figures):
            needed = table.commands[name].folder
            if needed is not None and needed not in folders:
                problems.append(f"{name} needs {table.commands[name].needs}. Give it: --folder {needed}=DIR.")
                continue
            try:
                document = _document(table, name, place / f"{name}.json", folders, resume, output)
                values |= {figure.name: figure.of(document) for figure in figures if figure.command == name}
            except (RuntimeError, ValueError, OSError) as error:
                problems.append(str(error))
    return values, problems


def _document(table: Suite, name: str, file: Path, folders: dict[str, str], resume: bool, output: Output) -> Any:
    """The JSON of a command: that of an earlier run, or of a run now."""
    done = file.with_suffix(".done")  # a command writes row by row, so its JSON may be there before it is whole
    if resume and done.is_file():
        output.note(f"{name}: kept")
        return table.result(name, file)
    output.note(f"{name}: {table.commands[name].run}")
    document = table.measure(name, file, folders)
    done.touch()
    return document


def _rich(table: Suite, figures: list[Figure], values: dict[str, float]) -> Any:
    from rich import table as tables

    grid = tables.Table("figure", box=None)
    for name in ("value", "low", "high", "baseline"):
        grid.add_column(name, justify="right")
    grid.add_column("")
    by_name = {figure.name: figure for figure in table.figures}
    for figure in figures:
        if figure.name not in values:
            continue
        row = figure.row(values[figure.name])
        base = ""
        if figure.baseline is not None:
            base = f"{values.get(figure.baseline, by_name[figure.baseline].value):.4g}"
        numbers = (f"{row[key]:.4g}" for key in ("value", "low", "high"))
        grid.add_row(figure.name, *numbers, base, "" if row["ok"] else "[red]outside[/red]")
    return grid
