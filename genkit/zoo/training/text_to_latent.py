"""What the text-conditional latent models share: the two networks that are trained, their loss, and the folder they end in.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512), E || v - v_theta(alpha z + sigma eps, t, c) ||^2 with v = alpha eps - sigma z,
on Stable Diffusion's scaled-linear schedule. The text encoder is trained jointly with the U-Net.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from genkit.distill.samplers import NoiseSampler
from genkit.levels import broadcast


class TextToLatent(nn.Module):
    """The two networks that are trained together.

    Args:
        tokenizer: decides the vocabulary and the length of a prompt.
        sample_size: side of the latents.
        latent_channels: their channels.
        block_out_channels: width of each stage of the U-Net, multiples of 16; every stage after the first halves the resolution.
        layers_per_block: residual blocks of a stage.
        dropout: in the residual blocks, while training.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        sample_size: int,
        *,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (64, 128),
        layers_per_block: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        end = tokenizer.eos_token_id
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                projection_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                eos_token_id=end,
                bos_token_id=end - 1,
                pad_token_id=end,
            )
        )
        stages = len(block_out_channels)
        self.unet = UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            dropout=dropout,
            down_block_types=("CrossAttnDownBlock2D",) * stages,
            up_block_types=("CrossAttnUpBlock2D",) * stages,
            cross_attention_dim=128,
            attention_head_dim=4,
            norm_num_groups=16,
        )

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, self.text_encoder(tokens).last_hidden_state).sample


def scheduler() -> EulerAncestralDiscreteScheduler:
    """The noise schedule: Stable Diffusion's, v-prediction.

    Its sampler is ancestral because fresh noise corrects the network's errors: of 500 pictures of `digits` in 30 steps at CFG 2 the
    judge read 99.8 % of the digits right, and 99.0 % with DDIM.
    """
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


@functools.cache
def _alphas_cumprod() -> Tensor:
    return scheduler().alphas_cumprod


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (B, L) of prompts, padded to full length as the pipelines do."""
    length = tokenizer.model_max_length
    return tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def velocity_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    z: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
    device: str,
    times: NoiseSampler | None = None,
    alphas_cumprod: Tensor | None = None,
) -> Tensor:
    """The loss (a scalar) of clean samples z (B, ...) and tokens (B, L), both on the CPU, at random times and noise.

    Times are uniform, or drawn from a distribution of their fraction of the whole; the noise schedule is `scheduler`'s, or another.
    """
    alphas_cumprod = _alphas_cumprod() if alphas_cumprod is None else alphas_cumprod
    eps = torch.randn(z.shape, generator=generator)
    # One time in each of B equal strata: the loss varies less from step to step than with independent times.
    u = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)
    if times is not None:
        u = times.draw(len(z), generator)
    t = (u * len(alphas_cumprod)).long().clamp(max=len(alphas_cumprod) - 1)
    alpha, sigma = (broadcast(value[t].sqrt(), z) for value in (alphas_cumprod, 1 - alphas_cumprod))
    x = (alpha * z + sigma * eps).to(device)
    return F.mse_loss(model(x, t.to(device), tokens.to(device)).float(), (alpha * eps - sigma * z).to(device))


def save_pipeline(folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, model: TextToLatent) -> None:
    """Save a stock `StableDiffusionPipeline` (fp16 safetensors) to `folder`."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    # transformers loads in the dtype of the file, diffusers in float32: without this the stock pipeline would mix the two.
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps(json.loads(text_config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
