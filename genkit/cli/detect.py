"""`genkit detect`: objects in images, by a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genkit.cli.common import Attn, Debug, Device, Json, Quiet, check_attn, check_device, check_dtype, check_model, command, option

_WHAT, _HOW, _WHERE, _MACHINE = "What to find", "How to decide", "Files", "Machine"


def detect(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders (searched recursively), patterns.")],
    model: Annotated[
        str, option(_WHAT, "A layout-to-image model: embedded (`genkit zoo list`), a folder, or a Hub repository.")
    ] = "scenes",
    labels: Annotated[
        str | None, option(_WHAT, "Classes to find, as in seven,two; of GLIGEN any phrases.", show_default="all the model knows")
    ] = None,
    prior: Annotated[
        str | None,
        option(_HOW, "Prior of layouts: embedded, or a folder of `genkit train layout-prior`; none for none.",
               show_default="scenes-prior for all of scenes, else none"),
    ] = None,
    beta: Annotated[float, option(_HOW, "Weight of the prior's nats.", min=0)] = 1.0,
    pairs: Annotated[int, option(_HOW, "Pairs of noise level and noise that decide.", min=4)] = 24,
    budget: Annotated[int, option(_HOW, "Network evaluations of an image after which nothing more is looked for.", min=1)] = 8000,
    nms: Annotated[float, option(_HOW, "IoU from which one of two objects of a class is left out.", min=0.01, max=1)] = 0.5,
    least: Annotated[float, option(_WHERE, "Least score of what is reported and drawn.", min=0, max=1)] = 0.0,
    seed: Annotated[int, option(_HOW, "Of the noise.", min=0)] = 42,
    reference: Annotated[
        Path | None,
        option(_WHERE, "COCO annotation file of the images, found by their file names: reports average precision (pycocotools)."),
    ] = None,
    out: Annotated[
        Path | None, option(_WHERE, "Folder: pictures with boxes, detections.json, coco.json (COCO results), and a journal.")
    ] = None,
    resume: Annotated[bool, option(_WHERE, "Go on with the journal of --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    batch: Annotated[int, option(_MACHINE, "Network evaluations at a time.", min=1)] = 64,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "float32, float16 or bfloat16.")] = "float32",
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Detect objects with a layout-to-image diffusion model that was never trained to.

    The layout that explains an image best is searched: boxes come from the places that the model denoises badly, classes and boxes
    are those that lower its error most. A score is the probability of an object against none and against the other classes.
    Images that are not of the model's shape are cut to their centre; boxes are in pixels of the file.

    Examples:

        [bold]genkit detect photos/*.png --out found[/bold]

        [bold]genkit detect testset --reference testset/coco.json --out found --resume[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit detect testset --out found[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.cli.detect_job import Job
        from genkit.data.pictures import find_pictures
        from genkit.ranks import Ranks

        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        check_model(model, allow_pickle)
        chosen = (
            ("scenes-prior" if model == "scenes" and labels is None else None)
            if prior is None
            else (None if prior == "none" else prior)
        )
        if chosen is not None:
            check_model(chosen, allow_pickle)
        files = find_pictures(images)
        settings: dict[str, Any] = {
            "model": model, "dtype": dtype, "labels": _labels(labels), "prior": chosen, "beta": beta, "nms": nms,
            "budget": budget,
            "plan": {"count": pairs, "weighting": "elbo", "seed": seed},
        }  # fmt: skip
        if dry_run:
            text = f"Would detect in {len(files)} images with {model}, {'no prior' if chosen is None else f'the prior {chosen}'}."
            output.result({"count": len(files), "images": list(map(str, files)), **settings}, text)
            return
        Job(files, settings, reference, out, least, ranks, output).run(
            device=device, resume=resume, attn=attn, batch_size=batch, allow_pickle=allow_pickle
        )


def _labels(text: str | None) -> list[str] | None:
    if text is None:
        return None
    labels = [part.strip() for part in text.split(",") if part.strip()]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"--labels {text!r} names nothing, or something twice. Give labels as in seven,two.")
    return labels
