"""`genkit eval`: how good a set of images is, against a reference, its captions and its texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from genkit.cli.common import (
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
    read_prompts,
    resumable,
)
from genkit.cli.eval_suite import suite

if TYPE_CHECKING:
    from genkit.sweep import Plan

_WHAT, _MEASURE, _SAMPLE, _WHERE, _MACHINE = "What to measure", "How to measure", "Sampling", "Files", "Machine"
DISTANCES = ("fid", "kid", "precision", "recall", "density", "coverage")  # `genkit.metrics.evaluation.METRICS`, without torch
METRICS = (*DISTANCES, "accuracy", "clip")


class _ImagesOrSuite(TyperGroup):
    """`genkit eval suite` is a command; whatever else follows `genkit eval` belongs to the command over images."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["suite"] else ["images", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        return ("" if name == "images" else name), found, rest  # what usage calls it after `genkit eval`


evaluation = typer.Typer(cls=_ImagesOrSuite)
evaluation.command("suite")(suite)


@evaluation.command("images")
def images(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of images, or FILE.npz. With --model they are sampled into it first.")
    ],
    reference: Annotated[
        str | None,
        option(_WHAT, "What to compare with: a folder of images, FILE.npz, digits (the held-out real ones), or digits-train."),
    ] = None,
    metrics: Annotated[
        str | None, option(_WHAT, f"Some of {','.join(METRICS)}.", show_default="all that there is something to compare with")
    ] = None,
    count: Annotated[
        int | None,
        option(_WHAT, "So many images: a random choice by --seed; with --model, how many to sample.", min=1, show_default="all"),
    ] = None,
    features: Annotated[
        str, option(_MEASURE, "Network whose features are compared: judge, inception, dinov2, timm:NAME or a folder. No downloads.")
    ] = "judge",
    clip: Annotated[Path | None, option(_MEASURE, "Folder of a CLIP model in transformers' layout, for the CLIP score.")] = None,
    bootstrap: Annotated[int, option(_MEASURE, "Replicates for the 95 % intervals; 0 for none.", min=0, max=100_000)] = 200,
    neighbours: Annotated[int, option(_MEASURE, "Which neighbour bounds a ball of precision to coverage.", "--k", min=1)] = 5,
    seed: Annotated[int, option(_MEASURE, "Of the choice, the intervals and the first image that is sampled.", min=0)] = 0,
    model: Annotated[str | None, option(_SAMPLE, "Sample with this model: an embedded one, a folder, or a Hub repository.")] = None,
    prompt: Annotated[list[str] | None, option(_SAMPLE, 'A prompt; "" is the null prompt. Repeat it for several.')] = None,
    prompts: Annotated[Path | None, option(_SAMPLE, "UTF-8 file with a prompt on each line; # starts a comment.")] = None,
    captions: Annotated[str | None, option(_SAMPLE, "digits: the captions of the held-out real digits.")] = None,
    steps: Annotated[int | None, option(_SAMPLE, "Sampling steps.", min=1, show_default="30, or a student's own")] = None,
    cfg: Annotated[
        float | None, option(_SAMPLE, "Classifier-free guidance; 1 is off.", show_default="3, or a student's own")
    ] = None,
    sampler: Annotated[str | None, option(_SAMPLE, "ddim, dpm++, euler, ...", show_default="the model's own")] = None,
    guidance: Annotated[list[str] | None, option(_SAMPLE, "NAME:key=value,... as of `genkit sample`. Repeat it to add.")] = None,
    resume: Annotated[bool, option(_WHERE, "Keep images and features that an interrupted run has finished.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    batch: Annotated[int, option(_MACHINE, "Images that are sampled at a time.", min=1)] = 16,
    device: Device = "auto",
    attn: Attn = "auto",
    dtype: Annotated[str, option(_MACHINE, "Of the sampled model: float32, float16 or bfloat16.")] = "float32",
    allow_pickle: Annotated[bool, option(_MACHINE, "Accept a model's weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a set of images.

    fid and kid are the Frechet and the kernel distance to the reference. precision and density say how many images are like the
    reference, recall and coverage how much of it there is among the images. accuracy is how often the embedded judge reads digit,
    ink and paper as an image's recipe, caption or folder says. clip is the CLIP score of images and captions.

    Each figure has a 95 % interval, and a warning where there are too few images for it. Features of the reference are kept in the
    user's cache. Images of other sizes are scaled until they cover the network's, and cut to their centre.

    [bold]genkit eval suite[/bold] measures the figures of the README again.

    Examples:

        [bold]genkit eval out --reference digits[/bold]

        [bold]genkit eval out --model digits --captions digits --count 1000 --cfg 2 --reference digits[/bold]

        [bold]genkit eval samples.npz --reference photos --features dinov2 --metrics fid,kid[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit eval out --reference digits[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks

        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        check_device(device)
        attn = check_attn(attn)
        check_dtype(dtype)
        wanted = _metrics(metrics, reference, clip)
        texts = _texts(prompt, prompts, captions)
        table = None
        if model is not None:
            settings = dict(steps=steps, cfg=cfg, sampler=sampler)  # noqa: C408
            table = _plan(model, texts, captions, count, seed, settings, guidance=guidance, dtype=dtype, allow_pickle=allow_pickle)
        elif texts or captions or steps or cfg is not None or sampler or guidance:
            raise ValueError("Options of sampling were given, but no model to sample with. Add --model NAME.")
        elif not folder.exists():
            raise FileNotFoundError(f"There is no folder or file {str(folder)!r}. To sample into it, add --model NAME.")
        plan: dict[str, Any] = {
            "folder": str(folder), "reference": reference, "metrics": wanted, "count": count, "features": features,
            "clip": None if clip is None else str(clip), "bootstrap": bootstrap, "k": neighbours, "seed": seed,
            "model": model, "to_sample": 0 if table is None else len(table.recipes),
        }  # fmt: skip
        if dry_run:
            first = f"sample {len(table.recipes)} images into {folder}, then " if table is not None else ""
            against = "" if reference is None else f" against {reference}"
            names = "what there is to measure" if wanted is None else ", ".join(wanted)
            output.result(plan, f"Would {first}measure {names} of {folder}{against}.")
            return
        from genkit.cli.eval_job import Job

        with resumable(output, plan, ranks):
            job = Job(plan, ranks, output, resume=resume)
            job.run(table, device=device, attn=attn, batch_size=batch, allow_pickle=allow_pickle)
        output.result(job.document, job.rich())


def _metrics(text: str | None, reference: str | None, clip: Path | None) -> list[str] | None:
    """The names of --metrics, or None for all that there is something to compare with.

    Raises:
        ValueError: an unknown one, or nothing to compare with.
    """
    from genkit.errors import unknown

    if text is None:
        return None
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if name in DISTANCES and reference is None:
            raise ValueError(f"The metric {name} compares with a reference. Give one: --reference DIR, FILE.npz or digits.")
        if name == "clip" and clip is None:
            raise ValueError("The metric clip needs a CLIP model. Give its folder: --clip DIR.")
    if not names:
        raise ValueError(f"--metrics {text!r} names no metric. Known: {', '.join(METRICS)}.")
    return names


def _texts(prompt: list[str] | None, file: Path | None, captions: str | None) -> list[str]:
    from genkit.errors import unknown

    if captions not in (None, "digits"):
        raise unknown("captions", str(captions), ["digits"])
    if captions is not None and (prompt or file is not None):
        raise ValueError("Both --captions and prompts were given. Give one of them.")
    return read_prompts(prompt, file)


def _plan(
    model: str, texts: list[str], captions: str | None, count: int | None, seed: int, settings: dict[str, Any], *,
    guidance: list[str] | None, dtype: str, allow_pickle: bool,
) -> Plan:  # fmt: skip
    """The images to sample: number i has prompt i (they repeat) and seed `seed` + i.

    Raises:
        ValueError: no prompt, or settings that do not fit.
    """
    import dataclasses
    import json

    from genkit.cli.sample import as_student
    from genkit.guidance import registry
    from genkit.recipe import Recipe
    from genkit.sweep import MAX_IMAGES, Plan

    folder = check_model(model, allow_pickle)
    given = {key: value for key, value in settings.items() if value is not None}
    base = Recipe(model=model, dtype=dtype, guidance=tuple(guidance or ()), **given)
    if folder is not None:
        base = as_student(base, folder, settings)
    for spec in base.guidance:
        registry.check(spec)
    if captions is not None:
        from genkit.zoo.quality import held_out

        texts = held_out(count or 1000).captions()
    speaks = folder is None or "tokenizer" in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if speaks and not texts:
        raise ValueError('There is no prompt. Say what to draw: --prompt "a red seven", --prompts FILE or --captions digits.')
    number = count or len(texts)
    if not 0 < number <= MAX_IMAGES:
        raise ValueError(f"Say how many images to sample, at most {MAX_IMAGES:,}: --count N.")
    subjects = [dataclasses.replace(base, prompt=text) for text in texts] or [base]
    recipes = tuple(dataclasses.replace(subjects[i % len(subjects)], seed=seed + i) for i in range(number))
    return Plan(recipes, (), (), "")
