"""`genkit train dreamteacher`: an ordinary backbone that learns a diffusion model's features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import (
    Attn,
    Debug,
    Device,
    Json,
    Output,
    Quiet,
    check_attn,
    check_device,
    check_model,
    command,
    option,
    resumable,
)
from genkit.cli.features import parse_taps, parse_times

if TYPE_CHECKING:
    from genkit.distill import DreamTeacherConfig
    from genkit.ranks import Ranks

_WHAT, _LOSS, _LABELS, _HOW, _WHERE = "What to train", "Features", "Labels", "How to train", "Files"
_PRESET = "the preset's"


def dreamteacher(
    data: Annotated[str, option(_WHAT, "Pictures: a folder, digits, or a folder of `genkit synth`, which are the teacher's own.")],
    out: Annotated[Path, option(_WHERE, "Folder of the run; the backbone and its card go to OUT/backbone.")],
    teacher: Annotated[str, option(_WHAT, "An embedded model, a folder, or a Hub repository.")] = "digits",
    backbone: Annotated[str | None, option(_WHAT, "Any model of timm with features.", show_default=_PRESET)] = None,
    preset: Annotated[
        str | None,
        option(
            _HOW,
            "appendix, main-text (its learning rate), ablation (its noise), imagenet, digits.",
            show_default="digits for that teacher, else appendix",
        ),
    ] = None,
    size: Annotated[int | None, option(_WHAT, "Side of the backbone's pictures in pixels.", min=8, show_default=_PRESET)] = None,
    taps: Annotated[
        str | None, option(_LOSS, "Blocks of the teacher, as for `genkit features`.", show_default=f"{_PRESET}, or its decoder's")
    ] = None,
    t: Annotated[
        str | None, option(_LOSS, "Timesteps of the noise; of several each picture gets one.", show_default=_PRESET)
    ] = None,
    encoding: Annotated[str | None, option(_LOSS, "stochastic or ddim.", show_default="stochastic")] = None,
    regressor: Annotated[
        str | None, option(_LOSS, "ppm-fpn, fpn, or simple, which is for ViTs.", show_default="as the backbone needs")
    ] = None,
    whitening: Annotated[str | None, option(_LOSS, "Of the teacher's features: over chw, c or none.", show_default="chw")] = None,
    mse: Annotated[float | None, option(_LOSS, "Weight of the features' distance.", min=0, show_default="1")] = None,
    attention: Annotated[float | None, option(_LOSS, "Weight of attention transfer.", min=0, show_default="10")] = None,
    task: Annotated[
        str | None, option(_LABELS, "Learn labels too, from a few: classification or segmentation.", show_default="no labels")
    ] = None,
    label: Annotated[float, option(_LABELS, "Weight of the soft labels, with --task.", min=0)] = 1.0,
    labelled: Annotated[int | None, option(_LABELS, "Pictures whose labels are used.", min=1, show_default="40")] = None,
    labels_from: Annotated[
        str | None,
        option(_LABELS, "Labelled pictures: a folder with a subfolder for each class, or digits.", show_default="--data"),
    ] = None,
    masks: Annotated[
        Path | None, option(_LABELS, "Folder of label maps: a/b.png for a/b.jpg, its grey values or palette indices are classes.")
    ] = None,
    temperature: Annotated[float | None, option(_LABELS, "Of the soft labels.", min=0.01, show_default="4")] = None,
    steps: Annotated[int | None, option(_HOW, "Updates of the weights.", min=1, show_default=_PRESET)] = None,
    batch: Annotated[int | None, option(_HOW, "Pictures in an update, of each process.", min=2, show_default=_PRESET)] = None,
    lr: Annotated[float | None, option(_HOW, "Peak learning rate.", min=0, show_default=_PRESET)] = None,
    warmup: Annotated[int | None, option(_HOW, "Steps of warm-up.", min=0, show_default=_PRESET)] = None,
    ema: Annotated[
        float | None, option(_HOW, "Decay of the average of the weights; 0 is none.", min=0, max=0.99999, show_default=_PRESET)
    ] = None,
    flip: Annotated[bool | None, option(_HOW, "The pictures' mirror images too.", show_default=_PRESET)] = None,
    count: Annotated[int | None, option(_WHAT, "Pictures; a folder with fewer is repeated.", min=2, show_default="all")] = None,
    seed: Annotated[int | None, option(_HOW, "Of everything random.", min=0, show_default="0")] = None,
    trackers: Annotated[str | None, option(_HOW, "Of accelerate, with commas: tensorboard, wandb, ...")] = None,
    resume: Annotated[bool, option(_WHERE, "Go on with the run in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Check everything, say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    attn: Attn = "auto",
    bf16: Annotated[bool | None, option("Machine", "Compute in bfloat16, student and teacher.", show_default="on")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Pretrain a backbone from a diffusion model (DreamTeacher): it learns the frozen model's features of pictures without labels.

    What comes out is a checkpoint for timm, to be fine-tuned with few labels. With [bold]--task[/bold] a few labels help already
    here: an interpreter on the teacher's features labels all pictures softly. Ctrl-C keeps a checkpoint.

    Examples:

        [bold]genkit train dreamteacher --teacher digits --backbone resnet18 --data digits --out runs/backbone[/bold]

        [bold]genkit train dreamteacher --teacher DIR --backbone convnext_tiny --data photos --task segmentation --masks masks
        --labelled 100 --out runs/mix[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks

        check_device(device)
        attn = check_attn(attn)
        check_model(teacher, False)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        parsed = None if t is None else parse_times(t)
        times = (parsed,) if isinstance(parsed, int) else None if parsed is None else tuple(parsed)
        from genkit.distill import DreamTeacherConfig

        config = DreamTeacherConfig.preset(
            preset or ("digits" if teacher == "digits" else "appendix"), teacher=teacher, backbone=backbone, size=size,
            taps=None if taps is None else tuple(parse_taps(taps)), t=times,
            encoding=encoding, regressor=regressor, whitening=whitening, mse=mse, attention=attention,
            task=task, label=label if task not in (None, "none") else None, labelled=labelled, temperature=temperature,
            flip=flip, teacher_bf16=bf16, steps=steps, batch_size=batch, lr=lr, warmup=warmup, ema_decay=ema, seed=seed, bf16=bf16,
            trackers=None if trackers is None else tuple(name.strip() for name in trackers.split(",") if name.strip()),
        )  # fmt: skip
        plan = {"data": data, "folder": str(out), "config": config.to_json()}
        with resumable(output, plan, ranks, after="from the last checkpoint"):
            _train(
                output, plan, config, out, ranks, data=data, labels_from=labels_from, masks=masks, count=count, resume=resume,
                dry_run=dry_run, device=device, attn=attn,
            )  # fmt: skip


def _train(
    output: Output, plan: dict[str, Any], config: DreamTeacherConfig, out: Path, ranks: Ranks, *, data: str,
    labels_from: str | None, masks: Path | None, count: int | None, resume: bool, dry_run: bool, device: str, attn: str,
) -> None:  # fmt: skip
    from genkit.attention import use_attention
    from genkit.cli.common import resolve_device
    from genkit.console import progress
    from genkit.data.source import open_source
    from genkit.distill import DreamTeacher, LatentDataset, export_backbone
    from genkit.distill.shards import read_record
    from genkit.runner import load

    synth = Path(data).is_dir() and read_record(Path(data)) is not None
    pictures = LatentDataset(data) if synth else open_source(data, count, masks=None if labels_from else masks)
    labelled = None if labels_from is None else open_source(labels_from, masks=masks)
    own = ranks.join(cpu=device == "cpu")
    pipe = load(config.teacher, device=own or resolve_device(device), quiet=output.quiet)
    run = DreamTeacher(pipe.denoiser, pictures, config, out, labelled=labelled, ranks=ranks)
    network = run.student.backbone.network
    plan |= {
        "pictures": len(pictures), "parameters": sum(p.numel() for p in network.parameters()), "labels": run.labels,
        "taps": {name: list(shape) for name, shape in run.teacher.shapes.items()}, "backbone": str(out / "backbone"),
    }  # fmt: skip
    what = f"{config.backbone} ({plan['parameters']:,} parameters) on {len(pictures):,} pictures of {data}"
    taps = ", ".join(run.teacher.shapes)
    if dry_run:
        output.result(plan, f"Would train {what} by {taps} of {config.teacher}, {config.train.steps:,} steps, into {out}.")
        return
    with progress(disable=not ranks.leads) as bar, use_attention(run.teacher.denoiser, attn):
        task = bar.add_task("encoding pictures", total=None)
        student = run.fit(resume=resume, progress=lambda done: bar.advance(task, done))
    if ranks.leads:
        export_backbone(student, config, out / "backbone")
        output.result(plan, f'Trained {what}. In timm: timm.create_model("local-dir:{out / "backbone"}", pretrained=True)')
