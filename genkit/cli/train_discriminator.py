"""`genkit train discriminator`: a network that corrects a model's samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import (
    Debug,
    Device,
    Json,
    Output,
    Quiet,
    check_device,
    check_dtype,
    check_model,
    command,
    option,
    positive_numbers,
    resumable,
)

if TYPE_CHECKING:
    from genkit.guidance.training import DiscriminatorConfig
    from genkit.ranks import Ranks

_WHAT, _HOW, _WHERE, _MACHINE = "What to train", "How to train", "Files", "Machine"


def discriminator(
    out: Annotated[Path, option(_WHERE, "Folder for the discriminator, and in training/ the samples, log and checkpoint.")],
    model: Annotated[str, option(_WHAT, "The model to correct: an embedded one, a folder, or a Hub repository.")] = "digits",
    data: Annotated[
        str, option(_WHAT, "Real images: digits, or a folder (captions in metadata.jsonl, classes as subfolders).")
    ] = "digits",
    count: Annotated[int, option(_WHAT, "Generated samples, and as many real ones.", min=20)] = 8000,
    steps: Annotated[str, option(_WHAT, "Sampling steps, as it will be guided; several as 10,30.")] = "30",
    sampler: Annotated[str | None, option(_WHAT, "As for `genkit sample`.", show_default="the model's own")] = None,
    cfg: Annotated[float, option(_WHAT, "Classifier-free guidance of the samples; 1 is off.")] = 1.0,
    eta: Annotated[float, option(_WHAT, "Noise of DDIM-like samplers, 0 to 1.")] = 0.0,
    extractor: Annotated[
        str, option(_WHAT, "Frozen features: an embedded noisy classifier, its folder, or none to train on the samples alone.")
    ] = "digits-noisy-classifier",
    width: Annotated[int, option(_WHAT, "Channels of the trained head (128 in the paper).", min=8)] = 64,
    depth: Annotated[int, option(_WHAT, "Residual blocks of the head (2 in the paper).", min=1)] = 1,
    conditional: Annotated[bool, option(_WHAT, "Let the head see the model's prompt or class.")] = True,
    updates: Annotated[int, option(_HOW, "At most so many updates of the weights.", min=1)] = 3000,
    patience: Annotated[
        int, option(_HOW, "Stop after so many validations, one every 100 updates, without a better one; 0 never.", min=0)
    ] = 8,
    lr: Annotated[float, option(_HOW, "Peak learning rate.", min=0)] = 5e-4,
    ema: Annotated[
        float, option(_HOW, "Decay of the average of the weights that is saved; 0 saves the weights.", min=0, max=0.99999)
    ] = 0.999,
    batch: Annotated[int, option(_HOW, "Real and generated samples in an update, together.", min=2)] = 128,
    seed: Annotated[int, option(_HOW, "Seed of the training.")] = 51,
    resume: Annotated[bool, option(_WHERE, "Go on with the samples and the checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    dtype: Annotated[str, option(_MACHINE, "Of the sampled model: float32, float16 or bfloat16.")] = "float32",
    sample_batch: Annotated[int, option(_MACHINE, "Samples drawn at a time.", min=1)] = 100,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a discriminator that corrects a model's samples (Discriminator Guidance).

    Samples the model, encodes real images, and trains a network of noisy samples to tell them apart, validated on held-out ones at
    every noise level. Sample with it: [bold]--guidance discriminator:model=DIR[/bold]. It corrects the model, sampler and number of
    steps that it was trained on. Ctrl-C keeps samples and checkpoint.

    Examples:

        [bold]genkit train discriminator --model digits --steps 10,30 --out runs/discriminator[/bold]

        [bold]torchrun --nproc_per_node 2 -m genkit train discriminator --data photos --model DIR --out runs/d[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.ranks import Ranks

        check_device(device)
        check_dtype(dtype)
        check_model(model, False)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        counts = positive_numbers("--steps", steps, "10,30")
        plan = {
            "model": model, "data": data, "folder": str(out), "count": count, "steps": list(counts), "sampler": sampler, "cfg": cfg,
            "extractor": None if extractor == "none" else extractor, "updates": updates,
        }  # fmt: skip
        if dry_run:
            output.result(plan, f"Would draw {count:,} samples of {model} at {steps} steps and train a discriminator into {out}.")
            return
        from genkit.guidance.training import DiscriminatorConfig
        from genkit.training import TrainConfig

        head = {
            "block_out_channels": (width,),
            "layers_per_block": depth,
            "attention_head_dim": min(64, width),
            "norm_num_groups": 8,
        }
        config = DiscriminatorConfig(
            count=count, steps=counts, sampler=sampler, guidance_scale=cfg, eta=eta, extractor=plan["extractor"], head=head,
            conditional=conditional,
            train=TrainConfig(steps=updates, batch_size=batch, lr=lr, ema_decay=ema, patience=patience, seed=seed),
        )  # fmt: skip
        with resumable(output, plan, ranks):
            figures = _train(output, plan, config, out, ranks, device=device, dtype=dtype, sample_batch=sample_batch, resume=resume)
        output.result(
            {**plan, **figures}, f"Trained a discriminator: {out}  (validation loss {figures['loss']:.4f}; chance is 0.6931)"
        )


def _train(
    output: Output, plan: dict[str, Any], config: DiscriminatorConfig, out: Path, ranks: Ranks, *,
    device: str, dtype: str, sample_batch: int, resume: bool,
) -> dict[str, Any]:  # fmt: skip
    import json

    from genkit.cli.common import resolve_device
    from genkit.data.source import open_source
    from genkit.files import prepare_folder
    from genkit.guidance.training import train_discriminator
    from genkit.runner import load

    prepare_folder(out)
    source = open_source(plan["data"], config.count)
    own = ranks.join(cpu=device == "cpu")
    pipe = load(plan["model"], dtype=dtype, device=own or resolve_device(device), quiet=output.quiet)
    train_discriminator(pipe, source, out, config, resume=resume, batch_size=sample_batch, ranks=ranks)
    lines = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()] if ranks.leads else []
    validations = [line["validation"] for line in lines if "validation" in line]
    return min(validations, key=lambda v: v["loss"]) if validations else {"loss": float("nan")}
