"""Trains the autoencoders of the latent models, `AutoencoderKL`: 32 x 32 RGB to 8 x 8 x 4, or any multiple of that.

Loss: |x - x'| + (x - x')^2 + w KL(q(z|x) || N(0, 1)), w = 1e-6 (Rombach et al. 2022, arXiv 2112.10752, appendix G, without the
adversarial and perceptual terms, which flat ink on flat paper does not need). `scaling_factor` is 1 / std(z).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from genkit.data import digits
from genkit.training import TrainConfig, fit

CONFIG = TrainConfig(steps=5000, batch_size=32, lr=2e-3, seed=21, ema_decay=0.998)
KL_WEIGHT = 1e-6


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu") -> AutoencoderKL:
    """Train on single digits and save to `folder` (fp16 safetensors); returns the fp32 model."""
    config = CONFIG if steps is None else dataclasses.replace(CONFIG, steps=steps)
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=digits.SIZE,
        force_upcast=False,
    )

    def draw(count: int, seed: int) -> Tensor:
        return digits.draw("train", count, seed=seed, augment="strong").images

    vae = fit_autoencoder(vae, draw, config, folder / "training", resume=resume, device=device)
    set_scaling_factor(vae, digits.draw("train", 2000, seed=1, augment="mild").images)
    vae.save_pretrained(folder)
    return vae


def fit_autoencoder(
    vae: AutoencoderKL,
    draw: Callable[[int, int], Tensor],
    config: TrainConfig,
    work: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
) -> AutoencoderKL:
    """Train an autoencoder on the pictures (B, 3, H, W) in [-1, 1] that `draw(count, seed)` makes; returns it on the CPU."""

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        x = draw(config.batch_size, int(torch.randint(2**31, (), generator=generator))).to(device)
        posterior = model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = model.decode(posterior.mean + posterior.std * noise).sample.float() - x
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    return fit(vae, loss, config, work, name="autoencoder", resume=resume, device=device).to("cpu")


@torch.inference_mode()
def set_scaling_factor(vae: AutoencoderKL, images: Tensor) -> None:
    """Make the latents of images (N, 3, H, W) have unit variance, over all channels together."""
    z = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(512)])
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstructions of images in [-1, 1], in dB."""
    error = vae.decode(vae.encode(images).latent_dist.mean).sample - images
    return (10 * torch.log10(4 / error.square().mean())).item()
