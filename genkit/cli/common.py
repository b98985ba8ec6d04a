"""What all commands share: options, output for people and machines, errors and exit codes.

Exit codes: 0 done, 1 something that is needed is broken, 2 usage or bad input, 3 partly done, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.errors import UnfusedAttentionError, UnfusedAttentionWarning

if TYPE_CHECKING:
    from genkit.ranks import Ranks

BROKEN, BAD_INPUT, PARTLY, INTERRUPTED = 1, 2, 3, 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel="Output")]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, cuda:N, mps or xpu; auto takes the fastest there is.", rich_help_panel="Machine"),
]
Attn = Annotated[
    str,
    typer.Option(
        help="What computes attention: auto (fused where it can be, and says where not), strict (an error where not), flash, "
        "efficient, cudnn, math, xformers, varlen or hub:NAME. `genkit doctor` says which are usable.",
        rich_help_panel="Machine",
    ),
]


def option(panel: str, text: str, *names: str, **arguments: Any) -> Any:
    """A typer option: its panel in the help, its help text, and whatever `typer.Option` takes."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **arguments)


# What a user can cause and repair; anything else is a defect of genkit.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, UnfusedAttentionError)


class Output:
    """Results go to stdout: text for people, or one JSON document. Everything else goes to stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def mute(self) -> None:
        """Print nothing but errors from now on, for a process that is not the first."""
        self.as_json, self.quiet = False, True

    def result(self, document: Any, text: str | Any = "") -> None:
        """Print the result of a command, once.

        Args:
            document: for `--json`; anything that JSON can hold.
            text: for people: a string, or something that rich renders.
        """
        if self.as_json:
            typer.echo(json.dumps(document, indent=2))
        elif not self.quiet and text:
            if isinstance(text, str):
                typer.echo(text)
            else:
                from rich.console import Console

                Console().print(text)

    def note(self, text: str) -> None:
        """Tell people something, on stderr."""
        if not self.quiet:
            typer.echo(text, err=True)


@contextmanager
def command(*, as_json: bool, quiet: bool, debug: bool) -> Iterator[Output]:
    """The body of a command: errors become one line on stderr (and `{"error": ...}` with --json) and an exit code."""
    from genkit.console import console

    output = Output(as_json=as_json, quiet=quiet)
    before, console.quiet = console.quiet, quiet
    try:
        with _plain_warnings(output):
            yield output
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        _fail(output, "Interrupted.", INTERRUPTED)
    except USER_ERRORS as error:
        if debug:
            raise
        _fail(output, _told(error), BAD_INPUT)
    except Exception as error:
        if debug:
            raise
        _fail(output, f"{type(error).__name__}: {error}\n{_advice(error)}", BROKEN)
    finally:
        console.quiet = before


@contextmanager
def _plain_warnings(output: Output) -> Iterator[None]:
    """What genkit warns of is a line on stderr, without the place in its code."""
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, UnfusedAttentionWarning):
            output.note(f"Warning: {_printable(str(message))}")
        else:
            before(message, category, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def resumable(output: Output, document: dict[str, Any], ranks: Ranks, *, after: str = "with what is there") -> Iterator[None]:
    """Work of several processes that goes on with --resume: Ctrl-C says so and is exit code 130; the processes part at the end.

    Args:
        document: what `--json` prints of an interrupted run.
        after: where the work goes on, for the message.
    """
    try:
        yield
    except KeyboardInterrupt:
        output.note(f"Interrupted. Repeat the command with --resume to go on {after}.")
        output.result({**document, "interrupted": True})
        raise typer.Exit(INTERRUPTED) from None
    finally:
        ranks.leave()


def positive_numbers(name: str, text: str, example: str) -> tuple[int, ...]:
    """The numbers of an option such as "10,30".

    Raises:
        ValueError: not a list of positive numbers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} {text!r} is not a list of positive numbers, as in {example}.")
    return tuple(int(part) for part in parts)


def _told(error: Exception) -> str:
    """A user's error in a sentence."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" Writing {str(error.filename)!r} failed." if error.filename else ""
        return f"{error.strerror}.{where} What was finished is kept: make room, and repeat the command with --resume."
    return str(error) or type(error).__name__


def _advice(error: Exception) -> str:
    if "out of memory" in str(error).lower():
        return "The device ran out of memory: lower --batch or --size."
    return "This may be a defect of genkit: run the command again with --debug, and report the traceback."


def _fail(output: Output, message: str, code: int) -> None:
    typer.echo(f"Error: {_printable(message)}" if code != INTERRUPTED else message, err=True)
    if output.as_json:
        output.result({"error": message})
    raise typer.Exit(code)


def _printable(text: str) -> str:
    """Without control characters, which could come from a file and forge terminal output."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)


def check_attn(name: str) -> str:
    """The choice of `--attn`, in lower case, without torch.

    Raises:
        ValueError: no such choice.
    """
    from genkit.attention.choices import check_choice

    return check_choice(name)


def check_device(name: str) -> None:
    """Check the form of a device's name, without torch.

    Raises:
        ValueError: not a device's name.
    """
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?", name):
        from genkit.errors import unknown

        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:N", "mps", "xpu"])


def check_dtype(name: str) -> None:
    """Raise ValueError for a dtype that models are not loaded in; without torch."""
    from genkit.errors import unknown
    from genkit.recipe import DTYPES

    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)


def resolve_device(name: str) -> str:
    """The device to use; imports torch.

    Raises:
        ValueError: not a device's name, or this machine or this torch has no such device.
    """
    import torch

    check_device(name)
    counts = {
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return next(kind for kind, count in counts.items() if count)
    kind, _, index = name.partition(":")
    if int(index or 0) >= counts[kind]:
        usable = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in counts.items() if count)
        raise ValueError(f"Device {name!r} is not usable here. Usable: {usable}. `genkit doctor` tells more.")
    return name


def check_model(model: str, allow_pickle: bool) -> Path | None:
    """The folder of a model, checked as far as goes without torch; None for one on the Hub.

    Raises:
        ValueError, FileNotFoundError: no such model, or its folder is damaged or unsafe.
    """
    from genkit import zoo
    from genkit.checkpoints import check_folder
    from genkit.errors import unknown

    if model in zoo.names() or model in zoo.TRAINABLE:
        folder = zoo.path(model)
    elif Path(model).exists() or model.startswith((".", "/", "~")):
        folder = Path(model).expanduser()
    elif model.count("/") == 1:
        return None
    else:
        raise unknown("model", model, zoo.names())
    check_folder(folder, allow_pickle, shapes=False)
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"The model {model!r} is no diffusion pipeline (there is no model_index.json), so it draws nothing.")
    return folder


def read_prompts(prompts: list[str] | None, file: Path | None, what: str = "prompt") -> list[str]:
    """Prompts of the command line, then those of the file; `what` they are, for messages.

    Raises:
        OSError, ValueError: the file is missing, not UTF-8, or holds no prompt.
    """
    found = list(prompts or [])
    if file is None:
        return found
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what}s file {str(file)!r} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise OSError(f"The {what}s file {str(file)!r} cannot be read ({error.strerror}).") from error
    in_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not in_file:
        raise ValueError(f"The {what}s file {str(file)!r} holds no {what}. Write one on each line.")
    return found + in_file
