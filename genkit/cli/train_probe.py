"""`genkit train probe`: a classifier of images from a few labels, on features of a frozen diffusion network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import Debug, Device, Json, Output, Quiet, check_device, check_model, command, option, resumable
from genkit.cli.features import open_data, parse_taps, parse_times

if TYPE_CHECKING:
    from genkit.features import ProbeConfig
    from genkit.ranks import Ranks

_WHAT, _HOW, _WHERE, _MACHINE = "What to train", "How to train", "Files", "Machine"


def probe(
    out: Annotated[Path, option(_WHERE, "Folder for the probe, its features and its training log.")],
    data: Annotated[str, option(_WHAT, "Labelled images: a folder with a subfolder for each class, or digits.")] = "digits",
    test: Annotated[
        str | None, option(_WHAT, "Labelled images to measure on.", show_default="digits-test for digits, else none")
    ] = None,
    model: Annotated[str, option(_WHAT, "An embedded model, a folder, or a Hub repository.")] = "digits",
    taps: Annotated[str, option(_WHAT, "Blocks or module paths, as for `genkit features`.")] = "mid",
    t: Annotated[str, option(_WHAT, "Timesteps of the noise on the images; several as 90,150,300.")] = "150",
    head: Annotated[str, option(_WHAT, "linear, attention, fusion (several taps or t) or feedback (two passes).")] = "linear",
    labels_per_class: Annotated[
        int | None, option(_WHAT, "Use so many labelled images of each class.", min=2, show_default="all")
    ] = None,
    draws: Annotated[
        int | None,
        option(_HOW, "Draws of the noise for each image.", min=1, show_default="one noise, the same for every image"),
    ] = None,
    pool: Annotated[int, option(_HOW, "Linear: average maps to so many steps along a side.", min=1)] = 2,
    width: Annotated[int, option(_HOW, "Other heads: width of the transformer (1024 in the paper).", min=4)] = 128,
    depth: Annotated[int, option(_HOW, "Other heads: its blocks (2 in the paper).", min=1)] = 2,
    updates: Annotated[int, option(_HOW, "Other heads: at most so many updates of the weights.", min=1)] = 2000,
    batch: Annotated[int, option(_HOW, "Other heads: images in an update.", min=2)] = 128,
    lr: Annotated[float, option(_HOW, "Other heads: peak learning rate.", min=0)] = 1e-3,
    seed: Annotated[int, option(_HOW, "Seed of the noise, the choice of images and the training.")] = 0,
    count: Annotated[int | None, option(_WHAT, "Images; a folder with fewer is repeated.", min=2, show_default="all")] = None,
    resume: Annotated[bool, option(_WHERE, "Go on with the features and the checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a probe: a classifier of images on features of a frozen diffusion network.

    The linear head is ridge regression, its penalty chosen by cross-validation; the others are small transformers. In Python,
    [bold]genkit.features.Probe.load(DIR).predict(images)[/bold] reads images with it. Ctrl-C keeps features and checkpoint.

    Examples:

        [bold]genkit train probe --data digits --taps block.6 --t 50 --labels-per-class 10 --out runs/probe[/bold]

        [bold]genkit train probe --data photos --model DIR --head fusion --taps mid,block.24 --t 90,150,300 --out runs/p[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        import dataclasses

        from genkit.ranks import Ranks

        check_device(device)
        check_model(model, False)
        times = parse_times(t)
        plan: dict[str, Any] = {
            "data": data, "test": test or ("digits-test" if data == "digits" else None), "model": model, "taps": parse_taps(taps),
            "t": [times] if isinstance(times, int) else times, "head": head, "labels_per_class": labels_per_class,
            "noise": draws or "fixed", "seed": seed, "folder": str(out),
        }  # fmt: skip
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        from genkit.features.probe import TRAIN, ProbeConfig

        config = ProbeConfig(
            taps=tuple(plan["taps"]), t=tuple(plan["t"]), head=head, labels_per_class=labels_per_class, noise=plan["noise"],
            seed=seed, pool=pool, width=width, depth=depth,
            train=dataclasses.replace(TRAIN, steps=updates, batch_size=batch, lr=lr, seed=seed),
        )  # fmt: skip
        if dry_run:
            output.result(plan, f"Would train a {head} probe on {data} at {taps} and t {t} of {model} into {out}.")
            return
        with resumable(output, plan, ranks):
            figures = _train(output, plan, config, out, ranks, count=count, resume=resume, device=device)
        text = f"Trained the {head} probe on {figures['images']:,} images: {out}  (validation accuracy {figures['accuracy']:.1%}"
        text += ")" if figures["test_accuracy"] is None else f"; {figures['test_accuracy']:.1%} on {plan['test']})"
        output.result({**plan, **figures}, text)


def _train(
    output: Output, plan: dict[str, Any], config: ProbeConfig, out: Path, ranks: Ranks, *, count: int | None, resume: bool,
    device: str,
) -> dict[str, Any]:  # fmt: skip
    from genkit.cli.common import resolve_device
    from genkit.console import progress
    from genkit.features import train_probe
    from genkit.files import prepare_folder
    from genkit.runner import load

    prepare_folder(out)
    source = open_data(plan["data"], count)
    test = None if plan["test"] is None else open_data(plan["test"], None)
    own = ranks.join(cpu=device == "cpu")
    pipe = load(plan["model"], device=own or resolve_device(device), quiet=output.quiet)
    with progress(disable=not ranks.leads) as bar:
        task = bar.add_task("features", total=None)
        trained, figures = train_probe(
            pipe.denoiser, source, out, config, resume=resume, ranks=ranks, progress=lambda rows: bar.advance(task, rows)
        )
    return {
        **figures,
        "labels": trained.labels,
        "test_accuracy": None if test is None or not ranks.leads else trained.accuracy(test),
    }
