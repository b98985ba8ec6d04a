"""`genkit distill`: a few-step student of a pretrained model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genkit.cli.common import INTERRUPTED, Attn, Debug, Device, Json, Quiet, check_attn, check_device, check_model, command, option

if TYPE_CHECKING:
    from genkit.cli.common import Output
    from genkit.denoisers import Denoiser
    from genkit.distill.config import DistillConfig
    from genkit.distill.data import LatentDataset
    from genkit.distill.trainer import DistillTrainer
    from genkit.ranks import Ranks

_WHAT, _DISC, _LOSS, _OPT, _RUN = "What to distil", "Discriminator", "Losses", "Optimisation", "Run"


def distill(
    method: Annotated[str, typer.Argument(help="ladd (latent, by the teacher's features) or add (by an image encoder's).")],
    data: Annotated[str, option(_WHAT, "Folder of `genkit synth`, a folder of captioned images, or digits.")],
    out: Annotated[Path, option(_RUN, "Folder of the run: settings, checkpoints, log, previews.")],
    teacher: Annotated[
        str | None, option(_WHAT, "An embedded model, a folder, or a Hub repository.", show_default="the recipe's, or digits")
    ] = None,
    student: Annotated[str | None, option(_WHAT, "full, or lora:RANK on the teacher's own weights.", show_default="full")] = None,
    init: Annotated[
        str | None,
        option(_WHAT, "Start from an earlier student: a run, an embedded model, or a folder.", show_default="the teacher"),
    ] = None,
    task: Annotated[str | None, option(_WHAT, "generate or inpaint.", show_default="generate")] = None,
    recipe: Annotated[Path | None, option(_WHAT, "TOML file with settings; options on the command line win.")] = None,
    count: Annotated[
        int | None, option(_WHAT, "Images of --data; fewer are repeated, digits come in other colours.", min=1)
    ] = None,
    sizes: Annotated[
        str | None, option(_WHAT, "Sizes to which images are cut, WIDTHxHEIGHT,...: one shape a batch.", show_default="the model's")
    ] = None,
    skip_bad: Annotated[bool, option(_WHAT, "Leave out unreadable images and shards instead of stopping.", "--skip-bad")] = False,
    levels: Annotated[
        str | None, option(_WHAT, "Fractions of the training time, from 1 (noise).", show_default="1,.75,.5,.25")
    ] = None,
    level_probs: Annotated[
        str | None, option(_WHAT, "P,P,.. of the levels, or warmup:ROUNDS:P,P,..;P,P,..", show_default="all alike")
    ] = None,
    disc_noise: Annotated[
        str | None,
        option(_DISC, "logit-normal:M,S, uniform, shifted:K or atan-lognormal:M,S.", show_default="logit-normal:1,1; 0,1 if small"),
    ] = None,
    taps: Annotated[str | None, option(_DISC, "half, quarter, all, or names with commas.", show_default="quarter")] = None,
    head: Annotated[str | None, option(_DISC, "conv2d, mlp or stylegan-t.", show_default="conv2d")] = None,
    head_width: Annotated[int | None, option(_DISC, "Channels inside a conv2d or mlp head.", min=1, show_default="256")] = None,
    encoder: Annotated[
        str | None, option(_DISC, "Of add: a timm ViT, or an embedded classifier.", show_default="vit_small_patch14_dinov2")
    ] = None,
    augment: Annotated[
        bool | None, option(_DISC, "The encoder of add sees pictures recoloured, moved, cut out at random.", show_default="on")
    ] = None,
    mismatched: Annotated[
        bool | None, option(_DISC, "Real samples with others' prompts are fakes too.", show_default="on for ladd")
    ] = None,
    gan: Annotated[str | None, option(_LOSS, "hinge, softplus or lsgan.", show_default="hinge")] = None,
    r1: Annotated[float | None, option(_LOSS, "Gradient penalty on head inputs.", min=0, show_default="1e-5")] = None,
    r1_every: Annotated[
        int | None, option(_LOSS, "Rounds from one penalty to the next, which is as many times larger.", min=1, show_default="16")
    ] = None,
    approximate_r1: Annotated[float | None, option(_LOSS, "The same by finite differences.", min=0, show_default="0")] = None,
    distillation: Annotated[
        float | None,
        option(_LOSS, "To the teacher's denoising of the student's samples.", min=0, show_default="add 2.5, ladd 0, .5 on images"),
    ] = None,
    distillation_weight: Annotated[str | None, option(_LOSS, "alpha, sds or const.", show_default="alpha")] = None,
    distillation_guidance: Annotated[
        float | None, option(_LOSS, "Guidance of the teacher in it.", min=0, show_default="1, off")
    ] = None,
    reconstruction: Annotated[
        float | None, option(_LOSS, "To the teacher's sample of the same noise; needs paired data.", min=0, show_default="0")
    ] = None,
    adversarial: Annotated[float | None, option(_LOSS, "Against the discriminator.", min=0, show_default="1")] = None,
    lr: Annotated[float | None, option(_OPT, "Of the student.", min=0, show_default="1e-5, LoRA 5e-5")] = None,
    disc_lr: Annotated[float | None, option(_OPT, "Of the heads.", min=0, show_default="1e-4")] = None,
    lr_scheduler: Annotated[
        str | None, option(_OPT, "diffusers' name: constant_with_warmup, cosine, ...", show_default="constant_with_warmup")
    ] = None,
    lr_warmup: Annotated[int | None, option(_OPT, "Rounds of warm-up.", min=0, show_default="0")] = None,
    weight_decay: Annotated[float | None, option(_OPT, "Of the student.", min=0, show_default="0")] = None,
    grad_clip: Annotated[float | None, option(_OPT, "Largest norm of a gradient; 0 is off.", min=0, show_default="1")] = None,
    ema: Annotated[float | None, option(_OPT, "Decay of the student's average.", min=0, max=0.99999, show_default=".999")] = None,
    ema_every: Annotated[int | None, option(_OPT, "Rounds after which the average follows.", min=1, show_default="1")] = None,
    ema_host: Annotated[bool | None, option(_OPT, "Keep the average in host memory.", "--ema-host", show_default="off")] = None,
    steps: Annotated[int | None, option(_OPT, "Rounds: an update of both networks each.", min=1, show_default="10000")] = None,
    batch_size: Annotated[int | None, option(_OPT, "Samples of a round, over all processes.", min=1, show_default="64")] = None,
    accumulation: Annotated[int | None, option(_OPT, "Micro-batches of a round.", min=1, show_default="1")] = None,
    fused: Annotated[
        bool | None, option(_OPT, "One pass of student and teacher for both updates.", show_default="with one micro-batch")
    ] = None,
    mixed_precision: Annotated[str | None, option(_OPT, "no or bf16; weights stay float32.", show_default="no")] = None,
    gradient_checkpointing: Annotated[
        bool | None, option(_OPT, "Less memory, a third more time.", "--gradient-checkpointing", show_default="off")
    ] = None,
    seed: Annotated[int | None, option(_RUN, "Of everything random.", min=0, show_default="0")] = None,
    resume: Annotated[str | None, option(_RUN, "latest, or checkpoint-N: go on with the run in --out.")] = None,
    checkpoint_every: Annotated[int | None, option(_RUN, "Rounds between checkpoints.", min=0, show_default="500")] = None,
    checkpoints_limit: Annotated[int | None, option(_RUN, "Checkpoints kept; 0 keeps all.", min=0, show_default="3")] = None,
    preview_every: Annotated[int | None, option(_RUN, "Rounds between previews; 0 is never.", min=0, show_default="500")] = None,
    log_every: Annotated[int | None, option(_RUN, "Rounds between lines of log.jsonl.", min=1, show_default="10")] = None,
    trackers: Annotated[str | None, option(_RUN, "Of accelerate, with commas: tensorboard, wandb, ...")] = None,
    dry_run: Annotated[
        bool, option(_RUN, "Check everything (of images, one batch), say what would be done, stop.", "--dry-run")
    ] = False,
    device: Device = "auto",
    attn: Attn = "auto",
    allow_pickle: Annotated[bool, option("Machine", "Accept weights that are pickles.", "--allow-pickle")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Distil a pretrained model to one to four steps by adversarial diffusion distillation, ADD or LADD.

    The run shows previews beside the teacher's pictures (previews/), logs figures (log.jsonl) and says when the two networks are
    out of balance. Ctrl-C and SIGTERM finish the round and save; [bold]--resume latest[/bold] goes on as if nothing had happened.
    What comes out of [bold]genkit export[/bold] is an ordinary diffusers pipeline.

    Examples:

        [bold]genkit synth --captions digits --count 16000 --guidance 2 --sampler dpm++ --steps 10 --out data[/bold]

        [bold]genkit distill ladd --teacher digits --data data --out run --lr 1e-4 --disc-lr 5e-4 --steps 2000[/bold]

        [bold]genkit export --run run --out turbo[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks

        check_device(device)
        attn = check_attn(attn)
        if recipe is not None:
            from genkit.distill.config import recipe_teacher

            named = recipe_teacher(recipe)
            teacher = teacher or named
        teacher = teacher or "digits"
        check_model(teacher, allow_pickle)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        from genkit.distill.config import TAP_SETS, DistillConfig

        parsed = _levels(levels, level_probs)
        changes: dict[str, Any] = {
            "teacher": teacher, "init": init, "task": task, "disc_noise": disc_noise, "head": head, "head_width": head_width,
            "encoder": encoder, "augment": augment,
            "mismatched": mismatched, "gan": gan, "r1": r1, "approximate_r1": approximate_r1, "distillation": distillation,
            "distillation_weight": distillation_weight, "distillation_guidance": distillation_guidance,
            "reconstruction": reconstruction, "adversarial": adversarial, "lr": lr, "disc_lr": disc_lr,
            "lr_scheduler": lr_scheduler, "lr_warmup": lr_warmup, "weight_decay": weight_decay, "grad_clip": grad_clip, "ema": ema,
            "r1_every": r1_every, "ema_every": ema_every, "ema_host": ema_host,
            "steps": steps, "batch_size": batch_size, "accumulation": accumulation, "fused": fused,
            "mixed_precision": mixed_precision, "gradient_checkpointing": gradient_checkpointing, "seed": seed,
            "checkpoint_every": checkpoint_every, "checkpoints_limit": checkpoints_limit, "preview_every": preview_every,
            "log_every": log_every, "trackers": None if trackers is None else _names(trackers),
            "taps": taps if taps is None or taps in TAP_SETS else _names(taps),
            "lora_rank": None if student is None else lora_rank(student), **parsed,
        }  # fmt: skip
        # What is wrong, before anything is loaded.
        planned = DistillConfig.preset(method, synthetic=True, side=64, recipe=recipe, **changes)
        own = ranks.join(cpu=device == "cpu")
        try:
            with TemporaryDirectory() as trial:
                denoiser, dataset = _open(
                    planned, data, Path(trial) if dry_run else out / "data", device, own, Ranks() if dry_run else ranks, output,
                    allow_pickle, planned.batch_size if dry_run else count, sizes, skip_bad,
                )  # fmt: skip
                config = DistillConfig.preset(
                    method, synthetic=dataset.seeds is not None, side=min(dataset.shapes[0][-2:]), recipe=recipe, **changes
                )
                items = None if dataset.folder == Path(trial) else len(dataset)
                from genkit.attention import use_attention
                from genkit.distill.trainer import DistillTrainer

                trainer = DistillTrainer(denoiser, dataset, config, out, ranks=ranks)
                del denoiser  # of which the trainer keeps what it needs
                with use_attention(trainer.student.network, attn), use_attention(trainer.teacher.denoiser, attn):
                    _train(trainer, output, items=items, resume=resume, dry_run=dry_run)
        finally:
            ranks.leave()


def _open(
    planned: DistillConfig, data: str, cache: Path, device: str, own: str | None, ranks: Ranks, output: Output, allow_pickle: bool,
    count: int | None, sizes: str | None, skip_bad: bool,
) -> tuple[Denoiser, LatentDataset]:  # fmt: skip
    """The teacher on its device, and the data, encoded into `cache` if they are images."""
    from genkit.cli.common import resolve_device
    from genkit.console import progress
    from genkit.distill.data import open_data
    from genkit.distill.shards import read_record
    from genkit.runner import load
    from genkit.sweep import parse_size

    record = read_record(Path(data)) if Path(data).is_dir() else None
    # All weights are trained from float32 ones; those that a LoRA leaves alone are bfloat16 where they compute in it.
    dtype = "bfloat16" if planned.lora_rank and planned.mixed_precision == "bf16" else "float32"
    pipe = load(
        planned.teacher, dtype=dtype, device=own or resolve_device(device), allow_pickle=allow_pickle, quiet=output.quiet,
        text_encoders=record is None or not record.get("embeds", False),
    )  # fmt: skip
    shapes = None if sizes is None else [(h, w) for w, h in (parse_size(part) for part in _names(sizes))]
    with progress(disable=not ranks.leads) as bar:
        task = bar.add_task("encoding images", total=None, visible=False)

        def advance(images: int) -> None:
            bar.update(task, advance=images, visible=True)

        dataset = open_data(
            data, pipe.denoiser, cache=cache, count=count, sizes=shapes, skip_bad=skip_bad, ranks=ranks, progress=advance
        )
    if dataset.skipped:
        output.note(f"Left out {len(dataset.skipped)} unreadable files, the first {dataset.skipped[0]!r}.")
    return pipe.denoiser, dataset


def _train(trainer: DistillTrainer, output: Output, *, items: int | None, resume: str | None, dry_run: bool) -> None:
    """Say what would be done, or do it."""
    config, out = trainer.config, trainer.run.folder
    trained = sum(p.numel() for p in trainer.student.trained())
    heads = sum(p.numel() for p in trainer.discriminator.parameters())
    plan = {
        "folder": str(out), "processes": trainer.ranks.world, "items": items, "trained_parameters": trained,
        "head_parameters": heads, "taps": trainer.discriminator.source.names, "config": config.to_json(),
    }  # fmt: skip
    shown = "images that are encoded first" if items is None else f"{items:,} items"
    what = f"{config.teacher} by {config.method.upper()} into {out}: {trained:,} parameters, {shown}"
    if dry_run:
        output.result(plan, f"Would distil {what}, {config.steps:,} rounds of {config.batch_size}.")
        return
    trainer.fit(resume)
    document = {**plan, "step": trainer.step, "warnings": trainer.monitor.warnings, "interrupted": trainer.interrupted}
    if trainer.interrupted:
        output.note(f"Interrupted after round {trainer.step}. Repeat the command with --resume latest to go on.")
        output.result(document)
        raise typer.Exit(INTERRUPTED)
    output.result(document, f"Distilled {what}. Next: genkit export --run {out} --out DIR")


def lora_rank(student: str) -> int:
    """0 for "full", RANK for "lora:RANK".

    Raises:
        ValueError: another text.
    """
    kind, _, rank = student.partition(":")
    if student == "full":
        return 0
    if kind != "lora" or not rank.isdecimal() or not int(rank):
        raise ValueError(f"--student {student!r} is neither full nor lora:RANK, as in lora:64.")
    return int(rank)


def _levels(levels: str | None, probs: str | None) -> dict[str, Any]:
    if levels is None and probs is None:
        return {}
    from genkit.distill.samplers import LevelSampler

    sampler = LevelSampler.parse(levels or "1,.75,.5,.25", probs)
    return {
        "levels": sampler.levels, "level_probs": sampler.probs, "warmup_probs": sampler.warmup_probs,
        "warmup_steps": sampler.warmup_steps or None,
    }  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
