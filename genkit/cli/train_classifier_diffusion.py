"""`genkit train classifier-diffusion`: a generative classifier from a labelled folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from genkit.cli.common import Debug, Device, Json, Quiet, check_device, command, option, positive_numbers, resumable

if TYPE_CHECKING:
    from genkit.ranks import Ranks
    from genkit.zoo.training.class_conditional import ClassConditionalConfig

_WHAT, _HOW, _WHERE, _MACHINE = "What to train", "How to train", "Files", "Machine"


def classifier_diffusion(
    data: Annotated[Path, option(_WHAT, "Folder of pictures; the subfolder of a picture is its class.")],
    out: Annotated[Path, option(_WHERE, "Folder for the model, and in training/ the checkpoint and the log.")],
    val: Annotated[
        Path | None,
        option(_WHAT, "Folder of the same kind that decides which weights are kept.", show_default="a tenth of --data"),
    ] = None,
    vae: Annotated[
        str, option(_WHAT, "Frozen autoencoder: of an embedded model, a folder (AutoencoderKL or pipeline), or a Hub repository.")
    ] = "digits",
    size: Annotated[int | None, option(_WHAT, "Side of the pictures in pixels.", show_default="the VAE's", min=1)] = None,
    channels: Annotated[str, option(_WHAT, "Width of each stage of the U-Net, multiples of 16.")] = "64,128",
    layers: Annotated[int, option(_WHAT, "Residual blocks of a stage.", min=1)] = 1,
    steps: Annotated[int, option(_HOW, "Updates of the weights.", min=1)] = 4000,
    batch: Annotated[int, option(_HOW, "Pictures in an update, of each process.", min=1)] = 64,
    lr: Annotated[float, option(_HOW, "Peak learning rate.", min=0)] = 1e-3,
    ema: Annotated[
        float, option(_HOW, "Decay of the average of the weights that is saved; 0 saves the weights.", min=0, max=0.99999)
    ] = 0.998,
    label_dropout: Annotated[float, option(_HOW, "Share of labels that become the null prompt.", min=0, max=0.99)] = 0.1,
    dropout: Annotated[float, option(_HOW, "Dropout in the residual blocks of the U-Net.", min=0, max=0.99)] = 0.0,
    times: Annotated[
        str, option(_HOW, "Training times: uniform, or logit-normal:M,S; 0.3,0.8 dwells where classes differ.")
    ] = "uniform",
    validate_every: Annotated[int, option(_HOW, "Updates between two validations.", min=1)] = 250,
    patience: Annotated[int, option(_HOW, "Stop after so many validations without a better one; 0 never.", min=0)] = 0,
    seed: Annotated[int, option(_HOW, "Seed of the training.")] = 61,
    resume: Annotated[bool, option(_WHERE, "Go on from the checkpoint in --out.", "--resume")] = False,
    dry_run: Annotated[bool, option(_WHERE, "Say what would be done, and stop.", "--dry-run")] = False,
    device: Device = "auto",
    bf16: Annotated[
        bool, option(_MACHINE, "Compute in bfloat16 where that is safe; small networks on a CPU may be faster without.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a generative classifier: a class-conditional diffusion model of labelled pictures, from scratch.

    The result is a Stable Diffusion pipeline whose prompts are the class names: [bold]genkit classify[/bold] scores with it,
    [bold]genkit sample[/bold] draws from it, diffusers loads it. Weights are kept by the loss on validation pictures of the same
    distribution. Ctrl-C keeps a checkpoint.

    Examples:

        [bold]genkit train classifier-diffusion --data photos/train --val photos/val --out runs/photos[/bold]

        [bold]genkit classify photos/test --model runs/photos[/bold]
    """
    with command(as_json=as_json, quiet=quiet, debug=debug) as output:
        from genkit.data.source import open_source
        from genkit.ranks import Ranks

        check_device(device)
        ranks = Ranks.from_environment()
        if not ranks.leads:
            output.mute()
        widths = positive_numbers("--channels", channels, "64,128")
        for folder in filter(None, (data, val)):
            if not folder.is_dir():
                raise ValueError(f"There is no folder {str(folder)!r}. Give one whose subfolders are the classes.")
        from genkit.training import TrainConfig
        from genkit.zoo.training.class_conditional import ClassConditionalConfig, class_labels

        config = ClassConditionalConfig(
            vae=vae, size=size, block_out_channels=widths, layers_per_block=layers, dropout=dropout,
            label_dropout=label_dropout, times=times,
            train=TrainConfig(
                steps=steps, batch_size=batch, lr=lr, warmup=min(200, steps), ema_decay=ema, seed=seed, patience=patience,
                validate_every=validate_every, bf16=bf16,
            ),
        )  # fmt: skip
        source, validation = open_source(data), None if val is None else open_source(val)
        classes = sorted(set(class_labels(source)))
        plan = {
            "data": str(data), "val": None if val is None else str(val), "folder": str(out), "vae": vae, "pictures": len(source),
            "classes": classes, "steps": steps, "batch": batch, "channels": list(widths),
        }  # fmt: skip
        if dry_run:
            what = f"{len(classes)} classes, {len(source):,} pictures"
            output.result(plan, f"Would train a diffusion model of {data} ({what}) for {steps:,} steps into {out}.")
            return
        with resumable(output, plan, ranks, after="from the last checkpoint"):
            card = _train(source, validation, config, out, ranks, device=device, resume=resume, quiet=quiet)
        if ranks.leads:
            kept = card["kept"]
            text = f"Trained a diffusion model of {len(card['class_prompts'])} classes: {out}  "
            output.result({**plan, **card}, text + f"(step {kept['step']:,}, validation loss {kept['validation_loss']:.4f})")


def _train(
    source: Any, validation: Any, config: ClassConditionalConfig, out: Path, ranks: Ranks, *, device: str, resume: bool, quiet: bool
) -> dict[str, Any]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from genkit.cli.common import resolve_device
    from genkit.files import prepare_folder
    from genkit.zoo.training.class_conditional import train_class_conditional

    transformers_logging.disable_progress_bar()
    if quiet:
        diffusers_logging.set_verbosity_error()
    prepare_folder(out)
    own = ranks.join(cpu=device == "cpu")
    return train_class_conditional(
        source, out, config, validation=validation, resume=resume, device=own or resolve_device(device), ranks=ranks
    )
