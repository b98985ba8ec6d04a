"""`genkit attention audit`: fused and unfused attention of a model, counted."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from genkit.cli.common import (
    BROKEN,
    Attn,
    Debug,
    Device,
    Json,
    Quiet,
    check_attn,
    check_device,
    check_dtype,
    check_model,
    command,
    option,
)

_WHAT, _MACHINE = "What to look at", "Machine"


def audit(
    model: Annotated[str, option(_WHAT, "An embedded model (`genkit zoo list`), a folder, or a Hub repository.")] = "digits",
    backward: Annotated[bool, option(_WHAT, "Also the backward passes of network and VAE.", "--backward")] = False,
    size: Annotated[str | None, option(_WHAT, "WIDTHxHEIGHT in pixels.", show_default="the model's own")] = None,
    check: Annotated[bool, option(_WHAT, "Exit code 1 if any attention is unfused or unproven.", "--check")] = False,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "float32, float16 or bfloat16.")] = "float32",
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Count a model's attention calls: fused, unfused and unproven, module by module.

    Runs the text encoders, the network and the VAE once, on one sample, and looks at every operator. Fused attention never has its
    whole matrix in memory, unfused has; of an opaque operator or a compiled region nothing is proven. Counts with a plus are
    forward + backward.

    Examples:

        [bold]genkit attention audit --model digits --backward[/bold]

        [bold]genkit attention audit --model my/folder --size 256x256 --check[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from rich.console import Group
        from rich.text import Text

        from genkit.sweep import parse_size

        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        width, height = (None, None) if size is None else parse_size(size)
        check_model(model, allow_pickle)
        report, findings = _audit(model, device, attn, dtype, allow_pickle, quiet, backward=backward, height=height, width=width)
        advice = [Text(finding.text, style="red" if finding.never else "yellow") for finding in findings]
        output.result(report.to_dict(), Group(report.table(), *advice))
        if check and report.unfused + report.unproven:
            typer.echo(f"Error: {report.unfused} attention calls are unfused and {report.unproven} unproven.", err=True)
            raise typer.Exit(BROKEN)


def _audit(model: str, device: str, attn: str, dtype: str, allow_pickle: bool, quiet: bool, **options: Any) -> tuple[Any, Any]:
    """The report, and what the lint says, one finding of each kind."""
    import warnings

    from genkit.attention import lint, use_attention
    from genkit.attention.whole import audit_pipeline
    from genkit.cli.common import resolve_device
    from genkit.console import console
    from genkit.runner import load

    with console.status(f"auditing {model}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it
        pipe = load(model, dtype=dtype, device=resolve_device(device), allow_pickle=allow_pickle, quiet=quiet)
        with use_attention(pipe, attn):
            report = audit_pipeline(pipe.denoiser, **options)
    return report, list({finding.what: finding for finding in reversed(lint(pipe))}.values())
