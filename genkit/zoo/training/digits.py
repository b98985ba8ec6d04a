"""Trains `digits`: a text-to-image latent diffusion model of 32 x 32 coloured digits, in Stable Diffusion's own classes.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512), E || v - v_theta(alpha z + sigma eps, t, c) ||^2 with v = alpha eps - sigma z,
on Stable Diffusion's scaled-linear schedule. The text encoder is trained jointly; 10 % of the captions are empty, which trains
the null prompt of classifier-free guidance.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from genkit.data import digits
from genkit.training import TrainConfig, fit
from genkit.zoo.training import autoencoder
from genkit.zoo.training.tokenizer import build_tokenizer

CONFIG = TrainConfig(steps=4500, batch_size=128, lr=1e-3, warmup=200, seed=31, ema_decay=0.999)
POOL = 65_536  # augmented pictures that are encoded once, before training
MAX_LENGTH = 32


class TextToLatent(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocabulary: int, end: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=128,
                intermediate_size=256,
                projection_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                eos_token_id=end,
                bos_token_id=end - 1,
                pad_token_id=end,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=digits.SIZE // 4,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(tokens).last_hidden_state).sample


def scheduler() -> EulerAncestralDiscreteScheduler:
    """The noise schedule of `digits`: Stable Diffusion's, v-prediction.

    Its sampler is ancestral because fresh noise corrects the network's errors: of 500 pictures in 30 steps at CFG 2 the judge read
    99.8 % of the digits right, and 99.0 % with DDIM.
    """
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


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
    model = TextToLatent(len(tokenizer), tokenizer.eos_token_id)
    latents, attributes = _encode_pool(vae)
    alphas_cumprod = scheduler().alphas_cumprod

    def loss(model: nn.Module, generator: torch.Generator, step: int) -> Tensor:
        index = torch.randint(len(latents), (config.batch_size,), generator=generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        text = [digits.training_caption(attributes[i], rng) for i in index.tolist()]
        tokens = tokenizer(text, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
        z = latents[index]
        eps = torch.randn(z.shape, generator=generator)
        # One time in each of B equal strata: the loss varies less from step to step than with independent times.
        u = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)
        t = (u * len(alphas_cumprod)).long()
        alpha, sigma = alphas_cumprod[t].sqrt().view(-1, 1, 1, 1), (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
        x = (alpha * z + sigma * eps).to(device)
        return F.mse_loss(model(x, t.to(device), tokens.to(device)).float(), (alpha * eps - sigma * z).to(device))

    ema = fit(model, loss, config, folder / "training", name="digits", resume=resume, device=device).to("cpu")
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=ema.text_encoder,
        tokenizer=tokenizer,
        unet=ema.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    # transformers loads in the dtype of the file, diffusers in float32: without this the stock pipeline would mix the two.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps(json.loads(text_config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


@torch.inference_mode()
def _encode_pool(vae: AutoencoderKL) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Scaled latents (N, 4, 8, 8) of the pool, and the attributes of each."""
    latents, attributes = [], []
    for seed in range(POOL // 4096):
        batch = digits.draw("train", 4096, seed=1000 + seed, augment="none")
        latents += [vae.encode(part).latent_dist.mean * vae.config.scaling_factor for part in batch.images.split(512)]
        attributes += batch.attributes()
    return torch.cat(latents).clone(), attributes
