"""`genkit attention lock`: the resources that the Triton kernels take, compiled for GPUs that need not be here."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import BROKEN, Debug, Json, Quiet, command, option

if TYPE_CHECKING:
    from genkit.attention.kernels.aot import Resources
    from genkit.attention.kernels.lock import Entry


def lock(
    check: Annotated[bool, option("Lock", "Compare with the lock: exit with 1 if something is wrong.", "--check")] = False,
    everything: Annotated[bool, option("Lock", "Compile every entry. Without it --check compiles one for each kernel and "
        "architecture, and writing compiles those whose source or tile changed.", "--all")] = False,
    only: Annotated[str, option("Lock", "Compile the entries that this pattern matches, as 'tangent_forward/sm90/*'.")] = "*",
    path: Annotated[Path | None, option("Lock", "The lock.", "--file", show_default="that of the package")] = None,
    jobs: Annotated[int, option("Machine", "Processes that compile; an entry takes 1 to 5 seconds.", min=1, max=64)] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Compile the attention kernels for compute capability 8.0, 9.0, 10.0 and 12.0, and lock what they take.

    No GPU is needed, and none has run these kernels. Each entry must spill no register, fit its architecture's shared memory and
    use its matrix instructions. Without --check the lock is written. Under another version of Triton than the lock's, only the
    limits count.

    Example:

        [bold]genkit attention lock --check[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from importlib.metadata import version

        from genkit.attention.kernels import lock as locks

        file = path or locks.PATH
        known = locks.entries()
        if not fnmatch.filter([entry.name for entry in known], only):
            raise ValueError(f"No entry matches {only!r}. They are like {known[0].name}.")
        locks.kernels()  # without Triton this says so
        triton_version = version("triton")
        old = locks.read(file) if check or file.exists() else {"triton": triton_version, "entries": {}}
        same = old["triton"] == triton_version
        stale = locks.stale(old)
        if everything or not (check or same):
            wanted = known
        elif check:
            wanted = locks.sample() if only == "*" else known
        else:
            wanted = [entry for entry in known if entry.name in stale]
        measured = _measure([entry for entry in wanted if fnmatch.fnmatchcase(entry.name, only)], jobs)
        problems = locks.compare(old, measured, triton_version) if check else locks.problems(measured)
        if check:
            problems += [f"{name}: source or tile changed since it was locked, write the lock anew" for name in stale]
        else:
            locks.write(_merged(old, measured, triton_version), file)
        if not same:
            output.note(f"The lock is of Triton {old['triton']}, this is {triton_version}: only the limits are demanded.")
        for problem in problems:
            output.note(problem)
        document = {
            "ok": not problems, "problems": problems, "triton": triton_version,
            "lock": {"file": str(file), "triton": old["triton"], "entries": len(known)}, "compiled": locks.rows(measured),
        }  # fmt: skip
        output.result(document, _table(document))
        if problems:
            raise typer.Exit(BROKEN)


def _measure(wanted: list[Entry], jobs: int) -> dict[Entry, Resources]:
    """Compile, with a progress bar."""
    from genkit.attention.kernels.lock import measure
    from genkit.console import progress

    measured = {}
    with progress() as bar:
        task = bar.add_task("compiling", total=len(wanted))
        for entry, resources in measure(wanted, jobs):
            measured[entry] = resources
            bar.advance(task)
    return measured


def _merged(old: Mapping[str, Any], measured: Mapping[Entry, Resources], triton_version: str) -> dict[str, Any]:
    """The lock with what was compiled now; entries that there are no more are dropped."""
    from genkit.attention.kernels import lock as locks

    rows = {**old["entries"], **locks.rows(measured)}
    names = [entry.name for entry in locks.entries()]
    return {"triton": triton_version, "entries": {name: rows[name] for name in names if name in rows}}


def _table(document: Mapping[str, Any]) -> Any:
    """For people: what was compiled, and the verdict. A tile is rows x keys, warps, stages."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("entry", "tile", "regs", "stack", "shared", "mma", box=None, pad_edge=False, padding=(0, 1))
    for name, row in document["compiled"].items():
        block_l, block_s, warps, stages = row["tile"]
        shape = f"{block_l}x{block_s}/{warps}/{stages}"
        table.add_row(name, shape, *(f"{row[key]:,}" for key in ("registers", "stack", "shared")), row["mma"])
    verdict = "all within the limits" if document["ok"] else f"{len(document['problems'])} problems"
    counts = f"{len(document['compiled'])} of {document['lock']['entries']} entries compiled"
    return Group(table, Text(f"{counts}, {verdict}. No GPU has run these kernels."))
