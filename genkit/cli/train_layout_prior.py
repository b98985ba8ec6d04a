"""`genkit train layout-prior`: which layouts are likely, learned from layouts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import Debug, Device, Json, Quiet, check_device, command, option, resumable

if TYPE_CHECKING:
    from genkit.layouts import Layout

_WHAT, _HOW, _WHERE, _MACHINE = "What to train", "How to train", "Files", "Machine"


def layout_prior(
    out: Annotated[Path, option(_WHERE, "Folder for the prior, and in training/ the checkpoint and the log.")],
    data: Annotated[str, option(_WHAT, "Layouts: a COCO annotation file, or scenes.")] = "scenes",
    classes: Annotated[
        str | None, option(_WHAT, "Classes that layouts are made of; objects of others are left out.", show_default="all")
    ] = None,
    count: Annotated[int, option(_WHAT, "Layouts of scenes.", min=20)] = 40_000,
    slots: Annotated[int, option(_WHAT, "Most objects of a layout; pictures with more are left out.", min=1, max=1000)] = 6,
    steps: Annotated[int, option(_HOW, "Updates of the weights.", min=1)] = 6000,
    batch: Annotated[int, option(_HOW, "Layouts in an update.", min=1)] = 256,
    lr: Annotated[float, option(_HOW, "Peak learning rate.", min=0)] = 2e-3,
    seed: Annotated[int, option(_HOW, "Seed of the training.")] = 73,
    resume: Annotated[bool, option(_WHERE, "Go on from the checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a prior of layouts, a small diffusion model of classes and boxes, for [bold]genkit detect[/bold].

    It sees no pictures: which objects, how many, how large and where, is all it learns. Ctrl-C keeps a checkpoint.

    Examples:

        [bold]genkit train layout-prior --data instances_train2017.json --classes cat,dog --slots 30 --out runs/prior[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        import dataclasses

        from genkit.ranks import Ranks

        check_device(device)
        layouts, names = _layouts(data, classes, count, slots)
        plan: dict[str, Any] = {
            "data": data,
            "classes": names,
            "layouts": len(layouts),
            "slots": slots,
            "steps": steps,
            "folder": str(out),
        }
        if dry_run:
            output.result(
                plan, f"Would train a prior on {len(layouts):,} layouts of {len(names)} classes for {steps:,} steps into {out}."
            )
            return
        from genkit.cli.common import resolve_device
        from genkit.files import prepare_folder
        from genkit.zoo.training.layout_prior import CONFIG, LayoutPriorConfig, train_layout_prior

        training = dataclasses.replace(CONFIG, steps=steps, batch_size=batch, lr=lr, seed=seed, warmup=min(CONFIG.warmup, steps))
        config = LayoutPriorConfig(slots=slots, train=training)
        prepare_folder(out)
        with resumable(output, plan, Ranks(), after="from the last checkpoint"):
            figures = train_layout_prior(layouts, names, out, config, resume=resume, device=resolve_device(device))
        output.result({**plan, **figures}, f"Trained a prior on {len(layouts):,} layouts: {out}")


def _layouts(data: str, classes: str | None, count: int, slots: int) -> tuple[list[Layout], list[str]]:
    """Layouts of at most `slots` objects, and their classes.

    Raises:
        ValueError: a class that the data lack; no such data.
    """
    from genkit.data import scenes
    from genkit.data.coco import read_coco
    from genkit.errors import unknown
    from genkit.layouts import Layout

    if data == "scenes":
        found, known = scenes.layouts("train", count, seed=2000), list(scenes.CLASSES)
    elif Path(data).is_file():
        annotated = read_coco(Path(data))
        found, known = [image.layout for image in annotated.images], annotated.class_names
    else:
        raise ValueError(f"There is no file {data!r}. Give a COCO annotation file, or scenes.")
    names = known if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise unknown("class", name, known)
    kept = []
    for layout in found:
        named = [label if isinstance(label, str) else known[label] for label in layout.labels]
        rows = [i for i, name in enumerate(named) if name in names]
        if len(rows) <= slots:
            kept.append(Layout([named[i] for i in rows], [layout.boxes[i] for i in rows]))
    return kept, names
