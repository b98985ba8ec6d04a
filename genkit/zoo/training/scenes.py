"""Trains `scenes`: a layout-to-image latent diffusion model of 64 x 64 scenes with one to five handwritten digits.

The autoencoder is that of `digits`, trained on from there on crops of scenes. The network is a U-Net that begins with the weights
of `digits`. It reads the layout by cross-attention and, painted, as further input channels beside the coordinates (CoordConv: Liu
et al. 2018, arXiv 1807.03247); v-prediction as `text_to_latent` has it. A layout says all that is there: in training, some are
known in a rectangle alone, and the network is shown which. So what a layout leaves out costs as much as what it makes up, there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from genkit import zoo
from genkit.data import scenes
from genkit.denoisers.layout import network_input
from genkit.distill.samplers import LogitNormal
from genkit.layouts import LayoutEncoder
from genkit.layouts.layout import EMPTY, shuffled
from genkit.pipelines.layout import LayoutToImagePipeline
from genkit.training import TrainConfig, fit
from genkit.zoo.training.autoencoder import fit_autoencoder, set_scaling_factor
from genkit.zoo.training.text_to_latent import scheduler, velocity_loss

VAE_CONFIG = TrainConfig(steps=4000, batch_size=32, lr=2e-3, seed=71, ema_decay=0.998)
CONFIG = TrainConfig(steps=6000, batch_size=64, lr=1e-3, warmup=200, seed=72, ema_decay=0.999, validate_every=500)
POOL = 24_576  # scenes that are encoded once, before training
SLOTS = 6
WIDTH, PAINT = 128, 16
CROP = 32  # side of the crops that the autoencoder is trained on
TIMES = LogitNormal(0, 1)  # dwells where digits are told apart
NULL_SHARE, PARTIAL_SHARE = 0.1, 0.4  # of the layouts: not known; known in a rectangle
LEAST_KNOWN = 0.2  # side of that rectangle


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu", codec: str = "gligen") -> None:
    """Train and save a `LayoutToImagePipeline` to `folder`. Its autoencoder is taken from `folder/vae`, or trained first."""
    config = CONFIG if steps is None else dataclasses.replace(CONFIG, steps=steps)
    vae = _autoencoder(folder / "vae", resume=resume, device=device)
    torch.manual_seed(config.seed)
    model = LayoutToLatent(codec)
    begin_with_digits(model.unet)
    drawn = [scenes.draw("train", 4096, seed=1000 + seed) for seed in range(POOL // 4096)]
    latents, layouts = torch.cat([_encode(vae, batch) for batch in drawn]), torch.cat([packed(batch) for batch in drawn])
    held_out = scenes.draw("val", 400)
    val_latents, val_layouts = _encode(vae, held_out), with_known(packed(held_out))

    def loss(model: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        rows = torch.randint(len(latents), (config.batch_size,), generator=generator)
        return velocity_loss(model, latents[rows], thinned(layouts[rows], generator), generator, device, TIMES)

    def validate(model: nn.Module) -> dict[str, float]:
        generator = torch.Generator().manual_seed(config.seed)
        parts = zip(val_latents.split(100), val_layouts.split(100), strict=True)
        values = [velocity_loss(model, z, layout, generator, device).item() for z, layout in parts]
        return {"loss": sum(values) / len(values)}

    ema = fit(model, loss, config, folder / "training", name="scenes", resume=resume, device=device, validate=validate).to("cpu")
    pipe = LayoutToImagePipeline(vae=vae, unet=ema.unet, layout_encoder=ema.layout_encoder, scheduler=scheduler())
    pipe.to(dtype=torch.float16).save_pretrained(folder)


def _autoencoder(folder: Path, *, resume: bool, device: str) -> AutoencoderKL:
    """The autoencoder of the folder; that of `digits`, trained on on crops of scenes, where there is none yet."""
    trained = (folder / "config.json").exists()
    vae = AutoencoderKL.from_pretrained(folder if trained else zoo.path("digits") / "vae", dtype=torch.float32)
    if not trained:
        pool = torch.cat([scenes.draw("train", 4000, seed=seed).images for seed in range(2)])

        def draw(count: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randint(len(pool), (count,), generator=generator).tolist()
            corners = torch.randint(0, scenes.SIZE - CROP + 1, (count, 2), generator=generator).tolist()
            return torch.stack([pool[row, :, y : y + CROP, x : x + CROP] for row, (y, x) in zip(rows, corners, strict=True)])

        vae = fit_autoencoder(vae, draw, VAE_CONFIG, folder / "training", resume=resume, device=device)
        set_scaling_factor(vae, pool[:2000])
        vae.register_to_config(sample_size=scenes.SIZE)
        vae.save_pretrained(folder)
    # diffusers notes the folder that it read; the saved model must not name a folder of this machine.
    vae.register_to_config(_name_or_path="")
    return vae.eval()


@torch.inference_mode()
def _encode(vae: AutoencoderKL, batch: scenes.SceneBatch) -> Tensor:
    """Scaled latents (N, 4, 16, 16)."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in batch.images.split(128)]).clone() * vae.config.scaling_factor


class LayoutToLatent(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, codec: str = "gligen", block_out_channels: tuple[int, ...] = (64, 128), latent_channels: int = 4) -> None:
        super().__init__()
        paint = PAINT if codec == "gligen" else 0
        self.layout_encoder = LayoutEncoder(list(scenes.CLASSES), slots=SLOTS, dim=WIDTH, codec=codec, paint=paint)
        lower = len(block_out_channels) - 1  # the first stage has most of the places, and needs no attention: the layout is painted
        self.unet = UNet2DConditionModel(
            sample_size=scenes.SIZE // 4,
            in_channels=latent_channels + 2 + (paint + 4 if paint else 0),
            out_channels=latent_channels,
            block_out_channels=block_out_channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
            up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, t: Tensor, layout: Tensor) -> Tensor:
        told = self.layout_encoder(layout[:, :-1], layout[:, -1, 1:])
        return self.unet(network_input(x, told), t, told["layout_embeds"]).sample


@torch.no_grad()
def begin_with_digits(unet: UNet2DConditionModel) -> None:
    """Give a network what that of `digits` has learned of strokes; what it is told of the layout begins at zero."""
    known = UNet2DConditionModel.from_pretrained(zoo.path("digits") / "unet").state_dict()
    own = unet.state_dict()
    latents = known.pop("conv_in.weight")
    own["conv_in.weight"].zero_()[:, : latents.shape[1]] = latents
    unet.load_state_dict(own | {name: value for name, value in known.items() if name in own})


def packed(batch: scenes.SceneBatch) -> Tensor:
    """The layouts of scenes as one tensor (N, SLOTS, 5)."""
    layouts = torch.zeros(len(batch), SLOTS, 5)
    layouts[..., 0] = EMPTY
    for row, labels, boxes in zip(layouts, batch.labels, batch.boxes, strict=True):
        row[: len(labels)] = torch.cat([labels[:, None].float(), boxes], dim=1)
    return layouts


def thinned(layouts: Tensor, generator: torch.Generator) -> Tensor:
    """Layouts (B, N, 5) for training, slots in random order, with a further row: the box in which they are complete.

    Some are not known at all; of some only a rectangle is, and the objects that reach into it.
    """
    count = len(layouts)
    which = torch.rand(count, 1, generator=generator)
    sides = LEAST_KNOWN + (1 - LEAST_KNOWN) * torch.rand(count, 2, generator=generator)
    low = (1 - sides) * torch.rand(count, 2, generator=generator)
    known = torch.where(which < NULL_SHARE + PARTIAL_SHARE, torch.cat([low, low + sides], 1), torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    known = torch.where(which < NULL_SHARE, 0.0, known)
    reaches = ((layouts[..., 1:3] < known[:, None, 2:]) & (layouts[..., 3:] > known[:, None, :2])).all(-1, keepdim=True)
    told = torch.where(reaches, layouts, layouts.new_tensor([EMPTY, 0, 0, 0, 0]))
    return with_known(shuffled(told, generator), known)


def with_known(layouts: Tensor, known: Tensor | None = None) -> Tensor:
    """Layouts (B, N, 5) with the box (B, 4) in which they are complete, by default the picture, as a further row."""
    known = layouts.new_tensor([[0, 0, 1, 1]]).expand(len(layouts), -1) if known is None else known
    return torch.cat([layouts, F.pad(known, (1, 0))[:, None]], dim=1)
