"""Trains `digits`: a text-to-image latent diffusion model of 32 x 32 coloured digits, in Stable Diffusion's own classes.

Networks and loss are those of `text_to_latent`. 10 % of the captions are empty, which trains the null prompt of classifier-free
guidance.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from genkit.data import digits
from genkit.training import TrainConfig, fit
from genkit.zoo.training import autoencoder
from genkit.zoo.training.text_to_latent import TextToLatent, save_pipeline, tokenize, velocity_loss
from genkit.zoo.training.tokenizer import build_tokenizer

CONFIG = TrainConfig(steps=4500, batch_size=128, lr=1e-3, warmup=200, seed=31, ema_decay=0.999)
POOL = 65_536  # augmented pictures that are encoded once, before training
MAX_LENGTH = 32


def train(folder: Path, *, steps: int | None = None, resume: bool = False, device: str = "cpu") -> None:
    """Train and save a `StableDiffusionPipeline` to `folder`. Its autoencoder is taken from `folder/vae`, or trained first."""
    config = CONFIG if steps is None else dataclasses.replace(CONFIG, steps=steps)
    if (folder / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
        # diffusers notes the folder that it read; the saved model must not name a folder of this machine.
        vae.register_to_config(_name_or_path="")
    else:
        vae = autoencoder.train(folder / "vae", resume=resume, device=device)
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(digits.WORDS, MAX_LENGTH)
    model = TextToLatent(tokenizer, digits.SIZE // 4)
    latents, attributes = _encode_pool(vae)

    def loss(model: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        index = torch.randint(len(latents), (config.batch_size,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        text = [digits.training_caption(attributes[i], rng) for i in index.tolist()]
        return velocity_loss(model, latents[index], tokenize(tokenizer, text), generator, device)

    ema = fit(model, loss, config, folder / "training", name="digits", resume=resume, device=device).to("cpu")
    save_pipeline(folder, vae, tokenizer, ema)


@torch.inference_mode()
def _encode_pool(vae: AutoencoderKL) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Scaled latents (N, 4, 8, 8) of the pool, and the attributes of each."""
    latents, attributes = [], []
    for seed in range(POOL // 4096):
        batch = digits.draw("train", 4096, seed=1000 + seed, augment="none")
        latents += [vae.encode(part).latent_dist.mean * vae.config.scaling_factor for part in batch.images.split(512)]
        attributes += batch.attributes()
    return torch.cat(latents).clone(), attributes
