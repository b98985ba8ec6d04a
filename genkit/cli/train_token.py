"""`genkit train token`: a word for what a classifier sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import INTERRUPTED, Debug, Device, Json, Output, Quiet, check_device, check_model, command, option

if TYPE_CHECKING:
    from genkit.guidance.training import TokenConfig, TrainedToken
    from genkit.pipelines import GuidedPipeline

_WHAT, _HOW, _WHERE, _MACHINE = "What to train", "How to train", "Files", "Machine"
SHEET = "tokens.png"
SHEET_SEEDS = range(1000, 1006)


def token(
    classes: Annotated[str, option(_WHAT, "Classes of the guide, by name or index: seven,two. [NAME=]CLASS names the token.")],
    out: Annotated[Path, option(_WHERE, "Folder for the token files, the pictures, the log and the checkpoint.")],
    model: Annotated[
        str, option(_WHAT, "An embedded model, a folder, or a Hub repository: Stable Diffusion 1.x, 2.x, XL.")
    ] = "digits",
    guide: Annotated[str, option(_WHAT, "An embedded classifier, a folder, timm:NAME or torchvision:NAME.")] = "digits-classifier",
    guide_size: Annotated[int | None, option(_WHAT, "Resize to this many pixels for the guide.", min=1)] = None,
    guide_preprocess: Annotated[str, option(_WHAT, "none ([-1, 1] as it is) or imagenet.")] = "none",
    attribute: Annotated[str | None, option(_WHAT, "Attribute of an embedded classifier: digit, ink or paper.")] = None,
    prompt: Annotated[
        list[str] | None,
        option(_WHAT, "Prompt with {token} where the word goes. Repeat it for several.", show_default="a photo of a {token}"),
    ] = None,
    init: Annotated[
        str | None,
        option(_WHAT, "Word to start from; one of the kind is best.", show_default="an embedded guide's attribute (digit), or a"),
    ] = None,
    vectors: Annotated[int | None, option(_WHAT, "Embedding vectors of a token.", show_default="1")] = None,
    updates: Annotated[int | None, option(_HOW, "At most so many updates.", show_default="50")] = None,
    k: Annotated[int | None, option(_HOW, "Differentiate the last K network evaluations.", show_default="2")] = None,
    steps: Annotated[int | None, option(_HOW, "Sampling steps of the training images.", show_default="12")] = None,
    sampler: Annotated[str | None, option(_HOW, "As for `genkit sample`.", show_default="the model's own")] = None,
    cfg: Annotated[float | None, option(_HOW, "Classifier-free guidance.", show_default="2")] = None,
    batch: Annotated[int | None, option(_HOW, "Images of each class an update.", show_default="16")] = None,
    lr: Annotated[
        float | None, option(_HOW, "Learning rate, relative to the size of the embedding to start from.", show_default="0.1")
    ] = None,
    seed: Annotated[int, option(_HOW, "Seed of the training noise.")] = 0,
    gradient_checkpointing: Annotated[bool, option(_MACHINE, "Less memory for more time.", "--gradient-checkpointing")] = False,
    resume: Annotated[bool, option(_WHERE, "Go on from the checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be trained, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    dtype: Annotated[str, option(_MACHINE, "float32 or bfloat16.")] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train class tokens: words that make a classifier see the class (Discriminative Class Tokens).

    Writes NAME.safetensors for each class, a textual-inversion file of a few kB that any diffusers pipeline with the same text
    encoder loads with load_textual_inversion, and that [bold]genkit sample --token[/bold] takes; and tokens.png, before and after.
    Ctrl-C keeps a checkpoint. A class gets a token of its own name, or of the name before "=".

    Example:

        [bold]genkit train token --classes seven,four --prompt "a red {token}" --out tokens[/bold]

        [bold]genkit sample "a blue <seven>" --token tokens/seven.safetensors --seeds 0-7[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit import samplers
        from genkit.errors import unknown
        from genkit.files import prepare_folder

        check_device(device)
        if dtype not in ("float32", "bfloat16"):
            raise unknown("dtype", dtype, ["float32", "bfloat16"])
        targets = parse_classes(classes)
        if sampler is not None:
            samplers.require(sampler)
        check_model(model, False)
        given: dict[str, Any] = {
            "prompts": tuple(prompt) if prompt else None, "init": init or _kind(guide, attribute), "vectors": vectors,
            "updates": updates, "evaluations": k, "steps": steps, "cfg": cfg, "batch": batch, "lr": lr, "seed": seed,
            "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        from genkit.guidance.training.token_state import TokenConfig

        config = TokenConfig(**{name: value for name, value in given.items() if value is not None})
        guide_of = {"name": guide, "attribute": attribute, "size": guide_size, "preprocess": guide_preprocess}
        settings = {"model": model, "sampler": sampler, "dtype": dtype, "guide": guide_of, **dataclasses.asdict(config)}
        plan = {"classes": targets, "folder": str(out), "settings": settings}
        if dry_run:
            listed = ", ".join(f"<{name}> ({target})" for name, target in targets.items())
            output.result(plan, f"Would train {listed} with {guide} on {model} into {out}, at most {config.updates} updates.")
            return
        prepare_folder(out)
        try:
            _train(output, plan, targets, config, out, device=device, resume=resume)
        except KeyboardInterrupt:
            output.note("Interrupted. Repeat the command with --resume to go on from the last update.")
            output.result({**plan, "interrupted": True})
            raise typer.Exit(INTERRUPTED) from None


def _kind(guide: str, attribute: str | None) -> str | None:
    """What the classes of an embedded guide are, in a word: the name of the attribute that it reads."""
    import json

    from genkit import zoo

    if attribute is not None or guide not in zoo.names():
        return attribute
    labels = json.loads((zoo.path(guide) / "config.json").read_text(encoding="utf-8")).get("labels")
    return next(iter(labels)) if labels else None


def parse_classes(text: str) -> dict[str, str]:
    """The class of each token by the token's name, of "seven,two" or "lobster=122,bar=702".

    Raises:
        ValueError: nothing, a name twice, or one that cannot be a token's.
    """
    from genkit.tokens import token_of

    found: dict[str, str] = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        name, equals, target = (side.strip() for side in part.partition("="))
        target = target if equals else name
        token_of(name)
        if name in found or not target:
            raise ValueError(
                f"--classes {text!r:.100}: {name!r} is there twice." if target else f"--classes: {part!r} names no class."
            )
        found[name] = target
    if not found:
        raise ValueError("--classes is empty. Give at least one, as in seven,two.")
    return found


def _train(
    output: Output, plan: dict[str, Any], targets: dict[str, str], config: TokenConfig, out: Path, *, device: str, resume: bool
) -> None:
    from genkit import samplers
    from genkit.classifiers import load_classifier
    from genkit.cli.common import resolve_device
    from genkit.guidance import ClassifierEnergy
    from genkit.guidance.training import TokenTrainer
    from genkit.runner import load

    settings, device = plan["settings"], resolve_device(device)
    guide = settings["guide"]
    pipe = load(settings["model"], dtype=settings["dtype"], device=device, quiet=output.quiet)
    if settings["sampler"] is not None:
        pipe.scheduler = samplers.build(settings["sampler"], pipe.scheduler)
    network = load_classifier(guide["name"]).to(device)
    reading = {key: guide[key] for key in ("attribute", "size", "preprocess")}
    energies = {name: ClassifierEnergy(network, target, **reading) for name, target in targets.items()}
    trained = TokenTrainer(pipe, energies, config).train(out, resume=resume)
    rows = []
    for name, result in trained.items():
        file = out / f"{name}.safetensors"
        result.save(file, {**settings, "class": targets[name]})
        figures = {key: getattr(result, key) for key in ("token", "loss", "accuracy", "updates", "finished")}
        rows.append({"name": name, "class": targets[name], "file": str(file), **figures})
    sheet = _save_sheet(pipe, config, trained, out)
    output.result({**plan, "tokens": rows, "sheet": str(sheet)}, _table(rows, sheet))


def _save_sheet(pipe: GuidedPipeline, config: TokenConfig, trained: dict[str, TrainedToken], out: Path) -> Path:
    """Pictures of the same seeds with the word that training started from and with each token; seeds that were not trained on."""
    from genkit.images import contact_sheet, save_png

    pipe.load_tokens(*(out / f"{name}.safetensors" for name in trained))
    words = [config.init, *(result.token for result in trained.values())]
    prompts = [config.prompts[0].replace("{token}", word) for word in words]
    size = {"height": config.height, "width": config.width}
    scale = {"num_inference_steps": max(30, config.steps), "guidance_scale": config.cfg}
    rows = [pipe([text] * len(SHEET_SEEDS), seeds=list(SHEET_SEEDS), **size, **scale).images for text in prompts]
    columns = [f"seed {seed}" for seed in SHEET_SEEDS]
    path = out / SHEET
    save_png(contact_sheet(rows, [f"before: {prompts[0]}", *prompts[1:]], columns), path)
    return path


def _table(rows: list[dict[str, Any]], sheet: Path) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("token", "class", "updates", "finished by", "loss", "read right", "file", box=None, pad_edge=False)
    table.caption = f"Before and after: {sheet}"
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.0%}"
        cells = (row["token"], row["class"], str(row["updates"]), row["finished"], f"{row['loss']:.3f}", accuracy, row["file"])
        table.add_row(*(Text(cell) for cell in cells))
    return table
