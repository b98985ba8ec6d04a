"""Trains the autoencoder of the latent models: 32 x 32 RGB to 8 x 8 x 4, an `AutoencoderKL`.

Loss: |x - x'| + (x - x')^2 + w KL(q(z|x) || N(0, 1)), w = 1e-6 (Rombach et al. 2022, arXiv 2112.10752, appendix G, without the
adversarial and perceptual terms, which flat ink on flat paper does not need). `scaling_factor` is 1 / std(z).
"""

from __future__ import annotations

import dataclasses
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
    """Train and save to `folder` (fp16 safetensors); returns the fp32 model."""
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

    def loss(model: Any, generator: torch.Generator, step: int) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        x = digits.draw("train", config.batch_size, seed=seed, augment="strong").images
        x = x.to(device)
        posterior = model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        error = model.decode(posterior.mean + posterior.std * noise).sample.float() - x
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    vae = fit(vae, loss, config, folder / "training", name="autoencoder", resume=resume, device=device).to("cpu")
    with torch.inference_mode():
        z = vae.encode(digits.draw("train", 2000, seed=1, augment="mild").images).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 5))
    vae.save_pretrained(folder)
    return vae


@torch.inference_mode()
def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstructions of images in [-1, 1], in dB."""
    error = vae.decode(vae.encode(images).latent_dist.mean).sample - images
    return (10 * torch.log10(4 / error.square().mean())).item()
