"""`genkit features`: the activations of a frozen diffusion network on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import (
    Attn,
    Debug,
    Device,
    Json,
    Output,
    Quiet,
    check_attn,
    check_device,
    check_dtype,
    check_model,
    command,
    option,
    resumable,
)

if TYPE_CHECKING:
    from genkit.ranks import Ranks

_WHAT, _HOW, _WHERE, _MACHINE = "What to read", "How to read it", "Files", "Machine"


def features(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder of images, digits or digits-test.")],
    out: Annotated[Path, option(_WHERE, "Folder for the features: TAP.npy of (images, draws, ...), and features.json.")],
    model: Annotated[str, option(_WHAT, "An embedded model, a folder, or a Hub repository.")] = "digits",
    taps: Annotated[
        str, option(_WHAT, "Blocks or module paths: block.6,mid,up.0.pre; numbers count blocks from 0, or from -1 down.")
    ] = "mid",
    t: Annotated[str, option(_HOW, "Timesteps of the noise on the images, 0 to 999; several as 90,150,300.")] = "150",
    pool: Annotated[str, option(_HOW, "Average maps to N steps along a side; mean for one vector; none keeps them.")] = "2",
    draws: Annotated[
        int | None,
        option(_HOW, "Draws of the noise for each image.", min=1, show_default="one noise, the same for every image"),
    ] = None,
    seed: Annotated[int, option(_HOW, "Seed of the noise.")] = 0,
    count: Annotated[int | None, option(_WHAT, "Images; a folder with fewer is repeated.", min=1, show_default="all")] = None,
    storage: Annotated[str, option(_WHERE, "Numbers on the disk: float16 or float32.")] = "float16",
    resume: Annotated[bool, option(_WHERE, "Go on with the features in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "Of the network: float32, float16 or bfloat16.")] = "float32",
    batch: Annotated[int, option(_MACHINE, "Images at a time.", min=1)] = 32,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Save features of images: what a frozen diffusion network sees in them.

    Adds noise to each image, runs the network up to the deepest of the taps, and keeps its activations. Ctrl-C keeps what is
    finished. The arrays open with [bold]numpy.load(FILE, mmap_mode="r")[/bold]; features.json has the rows' names and labels.

    Examples:

        [bold]genkit features photos --model DIR --taps block.24 --t 90 --out features[/bold]

        [bold]genkit features digits --taps mid,block.6 --t 50,150 --pool mean --out features[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks

        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        check_model(model, False)
        times = parse_times(t)
        plan: dict[str, Any] = {
            "data": data, "model": model, "taps": parse_taps(taps), "t": times, "pool": parse_pool(pool), "seed": seed,
            "noise": draws or "fixed", "storage": storage, "folder": str(out),
        }  # fmt: skip
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        if dry_run:
            output.result(plan, f"Would save features of {data} at {taps} and t {t} of {model} into {out}.")
            return
        with resumable(output, plan, ranks):
            document = _extract(
                output, plan, out, ranks, count=count, resume=resume, device=device, attn=attn, dtype=dtype, batch=batch
            )
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in document["shapes"].items())
        output.result(document, f"Features of {document['images']:,} images in {out}: {shapes}")


def parse_taps(text: str) -> list[str | int]:
    """The taps of "block.6,mid,-1".

    Raises:
        ValueError: none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("--taps is empty. Name at least one, as in mid or block.6,up.0.pre.")
    return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts]


def parse_times(text: str) -> int | list[int]:
    """The timestep of "150", or those of "90,150".

    Raises:
        ValueError: not a list of timesteps.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--t {text!r:.100} is not a timestep or a list of them, as in 150 or 90,150,300.")
    times = [int(part) for part in parts]
    return times[0] if len(times) == 1 else times


def parse_pool(text: str) -> int | str | None:
    """The pooling of "2", "mean" or "none".

    Raises:
        ValueError: anything else.
    """
    if text in ("mean", "none"):
        return None if text == "none" else text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--pool {text!r:.100} must be a positive number, mean or none.")
    return int(text)


def open_data(name: str, count: int | None) -> Any:
    """The source of images; of the embedded digits every stroke once, unless another number is wanted."""
    from genkit.data.source import open_source

    return open_source(name, 4000 if name == "digits" and count is None else count)


def _extract(
    output: Output, plan: dict[str, Any], out: Path, ranks: Ranks, *, count: int | None, resume: bool, device: str, attn: str,
    dtype: str, batch: int,
) -> dict[str, Any]:  # fmt: skip
    from genkit.attention import use_attention
    from genkit.cli.common import resolve_device
    from genkit.console import progress
    from genkit.features import FeatureCache, FeatureExtractor
    from genkit.runner import load

    source = open_data(plan["data"], count)
    own = ranks.join(cpu=device == "cpu")
    pipe = load(plan["model"], dtype=dtype, device=own or resolve_device(device), quiet=output.quiet)
    extractor = FeatureExtractor(
        pipe.denoiser, plan["taps"], t=plan["t"], noise=plan["noise"], pool=plan["pool"], seed=plan["seed"]
    )
    with progress(disable=not ranks.leads) as bar, use_attention(pipe, attn):
        task = bar.add_task("features", total=-(-len(source) // ranks.world))
        cache = FeatureCache.build(
            extractor, source, out, dtype=plan["storage"], batch_size=batch, resume=resume, ranks=ranks,
            progress=lambda rows: bar.advance(task, rows),
        )  # fmt: skip
    shapes = {tap: list(cache[tap].shape) for tap in cache.record["taps"]}
    return {**plan, "images": len(cache), "shapes": shapes, "attention": extractor.proof.to_dict()}
