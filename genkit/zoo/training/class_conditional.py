"""Trains a generative classifier: a latent diffusion model p(x | y) of labelled pictures, from scratch.

    predict  argmax_y  log p(x | y) + log p(y)          Li et al., "Generative Classifiers Avoid Shortcut Solutions", ICLR 2025,
                                                        arXiv 2512.25034

log p(x | y) is estimated by the diffusion losses of `genkit.scoring`. The model is an ordinary `StableDiffusionPipeline` on the
latents of a frozen VAE whose prompts are the class names, so everything that takes a model takes it. There is no augmentation and
no knowledge of groups; which weights are kept is decided by the loss on in-distribution validation pictures alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from genkit import zoo
from genkit.checkpoints import check_folder
from genkit.console import progress
from genkit.data.source import ImageSource
from genkit.distill.samplers import NoiseSampler
from genkit.files import prepare_folder, write_atomic
from genkit.latents import LatentCodec
from genkit.ranks import Ranks
from genkit.training import TrainConfig, fit
from genkit.zoo.training.text_to_latent import TextToLatent, save_pipeline, tokenize, velocity_loss
from genkit.zoo.training.tokenizer import class_tokenizer

ENCODE_BATCH = 64
VALIDATION_DRAWS = 4  # times and noises at which each validation picture is looked at
TRAIN = TrainConfig(steps=4000, batch_size=64, lr=1e-3, warmup=200, ema_decay=0.998, seed=61, validate_every=250)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassConditionalConfig:
    """How to train the class-conditional model.

    Args:
        vae: the frozen autoencoder, an `AutoencoderKL`: that of an embedded model, a folder (of a VAE, or of a pipeline that has
            one), or a Hub repository.
        size: side of the square pictures in pixels; by default what the VAE was trained on.
        block_out_channels, layers_per_block, dropout: of the U-Net, see `TextToLatent`.
        label_dropout: share of the labels that are replaced by the null prompt "" (0.1: Ho & Salimans 2022, arXiv 2207.12598).
        times: distribution of the training times, see `NoiseSampler.parse`. "logit-normal:0.3,0.8" dwells where classes differ most
            (Esser et al. 2024, arXiv 2403.03206, sec. 3.1).
        held_out: share of each class that validates, where there are no validation pictures of their own.
        train: the training loop.

    Raises:
        ValueError: a width that is no multiple of 16, or a share outside 0 to 1.
    """

    vae: str = "digits"
    size: int | None = None
    block_out_channels: tuple[int, ...] = (64, 128)
    layers_per_block: int = 1
    dropout: float = 0.0
    label_dropout: float = 0.1
    times: str = "uniform"
    held_out: float = 0.1
    train: TrainConfig = TRAIN

    def __post_init__(self) -> None:
        if not self.block_out_channels or any(width < 16 or width % 16 for width in self.block_out_channels):
            raise ValueError(f"block_out_channels={self.block_out_channels} must be positive multiples of 16, at least one.")
        for name in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        NoiseSampler.parse(self.times)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be between 0 and 1.")


def train_class_conditional(
    source: ImageSource,
    folder: Path,
    config: ClassConditionalConfig | None = None,
    *,
    validation: ImageSource | None = None,
    resume: bool = False,
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train the model; save it to `folder` with a card, `card.json`, that has the prompt and the number of pictures of each class.

    Args:
        source: labelled pictures; the labels are the class names.
        folder: for the result, and in `training/` the checkpoint and the log (`log.jsonl`).
        validation: labelled pictures of the same distribution; by default a part of `source` is held out.
        resume: go on from the checkpoint that is there.
        ranks: processes that train together, after `Ranks.join`; each keeps a share of the training pictures.

    Returns:
        The card.

    Raises:
        ValueError: pictures without labels, fewer than two classes, names that the tokenizer cannot tell apart, a VAE that does not
            fit, or a run in the folder that is not to be resumed or was made otherwise.

    Example:
        >>> card = train_class_conditional(open_source("photos"), Path("runs/photos"))
        >>> pipe = StableDiffusionPipeline.from_pretrained("runs/photos")
    """
    config, ranks = config or ClassConditionalConfig(), ranks or Ranks()
    labels = class_labels(source)
    classes = sorted(set(labels))
    tokenizer = class_tokenizer(classes)
    vae = load_vae(config.vae)
    size = _size(vae, config)
    data = _split(source, labels, validation, config)
    work = folder / "training"
    prepare_folder(work)
    _require_same_run(work, source, classes, size, config, resume=resume, ranks=ranks)
    ranks.wait()

    codec = LatentCodec.from_vae(vae.to(device))
    rows = ranks.share(data.train)
    latents = _encode(codec, source, rows, size, ranks)
    names = [labels[row] for row in rows]
    val_latents = _encode(codec, data.validation, data.val, size, ranks)
    val_tokens = tokenize(tokenizer, data.val_labels)
    vae.to("cpu")

    torch.manual_seed(config.train.seed)
    model = TextToLatent(
        tokenizer, size // codec.factor, latent_channels=vae.config.latent_channels, block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block, dropout=config.dropout,
    )  # fmt: skip
    vocabulary = tokenize(tokenizer, ["", *classes])
    times = None if config.times == "uniform" else NoiseSampler.parse(config.times)
    index = torch.tensor([1 + classes.index(name) for name in names])

    def loss(model: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(latents), (config.train.batch_size,), generator=generator)
        kept = torch.rand(len(chosen), generator=generator) >= config.label_dropout
        tokens = vocabulary[index[chosen] * kept]
        return velocity_loss(model, latents[chosen], tokens, generator, device, times)

    def validate(model: nn.Module) -> dict[str, float]:
        """The loss of the true classes at fixed times and noises."""
        generator = torch.Generator().manual_seed(config.train.seed)
        z, tokens = val_latents.repeat(VALIDATION_DRAWS, 1, 1, 1), val_tokens.repeat(VALIDATION_DRAWS, 1)
        order = torch.randperm(len(z), generator=generator)
        parts = [(len(p), velocity_loss(model, z[p], tokens[p], generator, device, times).item()) for p in order.split(256)]
        return {"loss": sum(count * value for count, value in parts) / len(z)}

    ema = fit(
        model, loss, config.train, work, name="classifier-diffusion", resume=resume, device=device, validate=validate, ranks=ranks
    ).to("cpu")
    card = _card(source, labels, classes, size, config, work, ema) if ranks.leads else {}
    if ranks.leads:
        save_pipeline(folder, vae, tokenizer, ema)
        write_atomic(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    return card


def load_vae(name: str) -> AutoencoderKL:
    """The autoencoder of a name (see `ClassConditionalConfig.vae`), float32, frozen.

    Raises:
        ValueError: no `AutoencoderKL`, or one whose latents `StableDiffusionPipeline` cannot decode (shifted or standardised).
        OSError: a model that is neither a folder nor on the Hub.
    """
    folder = zoo.folder(name)
    if folder.is_dir():
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"{name!r} holds no AutoencoderKL. Name a folder of one, or of a pipeline that has one as its vae.")
        check_folder(folder)
        vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32)
    else:
        vae = _hub_vae(name)
    if vae.config.get("shift_factor") or vae.config.get("latents_mean") is not None:
        raise ValueError(f"The latents of the VAE {name!r} are shifted, which StableDiffusionPipeline does not undo. Use another.")
    # diffusers notes the folder that it read; the saved model must not name a folder of this machine.
    vae.register_to_config(_name_or_path="")
    return vae.eval().requires_grad_(False)


def _hub_vae(name: str) -> AutoencoderKL:
    """The VAE of a Hub repository: of a pipeline, or alone."""
    reason = ""
    for subfolder in ("vae", None):
        try:
            return AutoencoderKL.from_pretrained(name, subfolder=subfolder, dtype=torch.float32, use_safetensors=True)
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
    raise OSError(f"The VAE {name!r} is no folder here, and the Hub does not give it ({reason}). Check its name.")


@dataclasses.dataclass(frozen=True)
class _Split:
    """Rows of the training pictures, and rows and labels of the validation pictures in their own source."""

    train: list[int]
    validation: ImageSource
    val: list[int]
    val_labels: list[str]


def class_labels(source: ImageSource) -> list[str]:
    """The class name of each picture.

    Raises:
        ValueError: pictures without class names, or of one class only.
    """
    if source.labels is None:
        raise ValueError(f"{source.name!r} has no classes. Put the pictures of each class into a subfolder with its name.")
    labels = [str(label) for label in source.labels]
    if len(set(labels)) < 2:
        raise ValueError(f"{source.name!r} has one class only, {labels[0]!r}. Give at least two.")
    return labels


def _split(source: ImageSource, labels: list[str], validation: ImageSource | None, config: ClassConditionalConfig) -> _Split:
    if validation is not None:
        val_labels = class_labels(validation)
        strange = sorted(set(val_labels) - set(labels))
        if strange:
            raise ValueError(f"The validation pictures have the class {strange[0]!r}, which the training pictures lack.")
        return _Split(list(range(len(source))), validation, list(range(len(validation))), val_labels)
    generator = torch.Generator().manual_seed(config.train.seed)
    train, val = [], []
    for name in sorted(set(labels)):
        rows = [row for row, label in enumerate(labels) if label == name]
        if len(rows) < 2:
            raise ValueError(f"The class {name!r} has one picture only, so none can be held out to validate. Give more, or --val.")
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        cut = min(len(rows) - 1, max(1, round(config.held_out * len(rows))))
        val += rows[:cut]
        train += rows[cut:]
    return _Split(sorted(train), source, val, [labels[row] for row in val])


def _size(vae: AutoencoderKL, config: ClassConditionalConfig) -> int:
    size = config.size or vae.config.sample_size
    multiple = LatentCodec.from_vae(vae).factor * 2 ** (len(config.block_out_channels) - 1)
    if size < multiple or size % multiple:
        raise ValueError(f"size={size} does not fit the VAE and the U-Net. Use a positive multiple of {multiple}.")
    return size


def _require_same_run(
    work: Path, source: ImageSource, classes: list[str], size: int, config: ClassConditionalConfig, *, resume: bool, ranks: Ranks
) -> None:
    """Note what is trained on what, or refuse a folder with another run; the first process does it."""
    if not ranks.leads:
        return
    settings = {
        "classes": classes, "pictures": len(source), "vae": config.vae, "size": size, "seed": config.train.seed,
        "block_out_channels": list(config.block_out_channels), "layers_per_block": config.layers_per_block,
        "dropout": config.dropout, "label_dropout": config.label_dropout, "times": config.times, "held_out": config.held_out,
    }  # fmt: skip
    file = work / "settings.json"
    if file.exists():
        found = json.loads(file.read_text())
        changed = [key for key, value in settings.items() if found.get(key) != value]
        if not resume:
            raise ValueError(f"{str(work)!r} already holds a run. Use --resume to go on with it, or another --out.")
        if changed:
            raise ValueError(f"The run in {str(work)!r} was made with other {changed[0]}. Use another --out.")
    else:
        write_atomic(file, json.dumps(settings).encode())


@torch.inference_mode()
def _encode(codec: LatentCodec, source: ImageSource, rows: Sequence[int], size: int, ranks: Ranks) -> Tensor:
    """Latents (N, C, h, w) of some pictures, on the CPU."""
    latents = []
    with progress(disable=not ranks.leads) as bar:
        task = bar.add_task("latents", total=len(rows))
        for start in range(0, len(rows), ENCODE_BATCH):
            images = source.images(rows[start : start + ENCODE_BATCH], (size, size))
            latents.append(codec.encode(images.to(codec.vae.device)).cpu())
            bar.update(task, advance=len(images))
    return torch.cat(latents).clone()


def _card(
    source: ImageSource, labels: list[str], classes: list[str], size: int, config: ClassConditionalConfig, work: Path,
    model: nn.Module,
) -> dict[str, Any]:  # fmt: skip
    lines = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "validation" in line), key=lambda line: line["validation"]["loss"])
    return {
        "what": f"generative classifier: class-conditional latent diffusion, {len(classes)} classes, {size} x {size}",
        "class_prompts": {name: name for name in classes},
        "counts": [labels.count(name) for name in classes],
        "data": source.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vae": config.vae,
        "training": {
            **dataclasses.asdict(config.train),
            "dropout": config.dropout,
            "label_dropout": config.label_dropout,
            "times": config.times,
        },
        "kept": {"step": best["step"], "validation_loss": best["validation"]["loss"]},
    }
