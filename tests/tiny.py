"""Tiny random pipelines of the real diffusers classes: a family each, under a second, the same for the same seed.

Every size is the smallest that still runs all the code paths of its family; the weights are random, the outputs noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
import transformers

from genkit.zoo.training.tokenizer import build_tokenizer

WORDS = ("a", "red", "blue", "green", "seven", "three", "cat", "on", "yellow", "paper", "bad")
LENGTH = 8  # tokens of a CLIP prompt
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # of Stable Diffusion


def pipeline(family: str, seed: int = 0, **config: Any) -> Any:
    """A tiny pipeline of `FAMILIES` or `STOCK`, in eval mode and float32; `config` overrides the network's configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = (FAMILIES | STOCK)[family](config)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Components


@cache
def clip_tokenizer() -> Any:
    return build_tokenizer(WORDS, LENGTH)


@cache
def t5_tokenizer() -> Any:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return transformers.T5Tokenizer(vocab=special + [("▁" + word, -1.0) for word in WORDS], extra_ids=0)


@cache
def gemma_tokenizer() -> Any:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return transformers.GemmaTokenizer(vocab={token: i for i, token in enumerate((*special, *"▁abcdefghijklmnopqrstuvwxyz"))})


def clip_text(projection: bool = False, hidden: int = 8) -> Any:
    vocabulary = len(clip_tokenizer())
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=16,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return transformers.CLIPTextModelWithProjection(config) if projection else transformers.CLIPTextModel(config)


def t5(hidden: int = 16) -> Any:
    config = transformers.T5Config(vocab_size=len(t5_tokenizer()), d_model=hidden, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def gemma(hidden: int = 16) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


def autoencoder(channels: int = 4, **config: Any) -> Any:
    """AutoencoderKL of factor 2."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **config,
    )


def deep_autoencoder(channels: int = 4) -> Any:
    """AutoencoderDC of factor 4."""
    return diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def tiny_autoencoder() -> Any:
    """AutoencoderTiny of factor 2."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


# Networks and pipelines


def _unet2d(config: dict[str, Any]) -> Any:
    return diffusers.UNet2DModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        | config
    )


def _unet_condition(config: dict[str, Any]) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "cross_attention_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        | config
    )


def _ddpm(config: dict[str, Any]) -> Any:
    return diffusers.DDPMPipeline(_unet2d(config), diffusers.DDPMScheduler())


def _ddim(config: dict[str, Any]) -> Any:
    return diffusers.DDIMPipeline(_unet2d(config), diffusers.DDIMScheduler())


def _dit(config: dict[str, Any]) -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 1000,  # the stock pipeline has the null class 1000 written into it
        }
        | config
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, steps_offset=0)
    names = {i: f"class {i}" for i in range(1, 1000)} | {0: "tench, Tinca tinca"}
    return diffusers.DiTPipeline(transformer, autoencoder(), scheduler, id2label=names)


def _stable_diffusion(config: dict[str, Any]) -> Any:
    scheduler = diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(scaling_factor=0.18215),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=_unet_condition(config),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(config: dict[str, Any]) -> Any:
    unet = _unet_condition(
        {
            "cross_attention_dim": 16,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 1),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        }
        | config
    )
    scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def _sd3(config: dict[str, Any]) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
        }
        | config
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(config: dict[str, Any]) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        **{
            "in_channels": 64,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 8,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 8),
        }
        | config
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def _pixart(pipeline_class: Any, config: dict[str, Any]) -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        **{
            "sample_size": 8,
            "num_layers": 2,
            "num_attention_heads": 3,  # a third of the width each for the height, the width and the aspect ratio
            "attention_head_dim": 8,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        }
        | config
    )
    return pipeline_class(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _pixart_alpha(config: dict[str, Any]) -> Any:
    # Of the 1024-pixel network: the only one that is told the size.
    return _pixart(diffusers.PixArtAlphaPipeline, {"sample_size": 128} | config)


def _pixart_sigma(config: dict[str, Any]) -> Any:
    return _pixart(diffusers.PixArtSigmaPipeline, config)


def _sana(config: dict[str, Any]) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "timestep_scale": 0.5,
        }
        | config
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(gemma_tokenizer(), gemma(), deep_autoencoder(), transformer, scheduler)


FAMILIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dit": _dit,
    "stable_diffusion": _stable_diffusion,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "pixart_alpha": _pixart_alpha,
    "pixart_sigma": _pixart_sigma,
    "sana": _sana,
}


# Pipelines without an adapter, for `attach`, and GLIGEN, whose condition is text and a layout


def _of_stable_diffusion(pipeline_class: Any, config: dict[str, Any], **components: Any) -> Any:
    """Another pipeline on Stable Diffusion's components."""
    pipe = _stable_diffusion(config)
    return pipeline_class(**(pipe.components | {"image_encoder": None} | components), requires_safety_checker=False)


def _controlnet(config: dict[str, Any]) -> Any:
    network = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
    )
    for layer in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight)  # zero by default, so that an untrained one does nothing
    return _of_stable_diffusion(diffusers.StableDiffusionControlNetPipeline, config, controlnet=network)


def _gligen(config: dict[str, Any]) -> Any:
    components = _stable_diffusion({"attention_type": "gated"} | config).components
    components.pop("image_encoder", None)
    pipe = diffusers.StableDiffusionGLIGENPipeline(**components, requires_safety_checker=False)
    for name, weight in pipe.unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            torch.nn.init.constant_(weight, 0.5)  # zero by default, so that an untrained fuser does nothing
    return pipe


def _inpaint(config: dict[str, Any]) -> Any:
    return _of_stable_diffusion(diffusers.StableDiffusionInpaintPipeline, config)


def _inpaint_concat(config: dict[str, Any]) -> Any:
    """With mask and masked picture as further input channels."""
    return _inpaint({"in_channels": 9} | config)


def _img2img(config: dict[str, Any]) -> Any:
    return _of_stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, config)


def _cogvideox(config: dict[str, Any]) -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 16,
            "num_layers": 1,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": LENGTH,
        }
        | config
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    return diffusers.CogVideoXPipeline(t5_tokenizer(), t5(), vae, transformer, scheduler)


def _animatediff(config: dict[str, Any]) -> Any:
    pipe = _stable_diffusion(config)
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2
    )
    return diffusers.AnimateDiffPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, adapter, diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False)
    )


STOCK: dict[str, Callable[[dict[str, Any]], Any]] = {
    "controlnet": _controlnet,
    "gligen": _gligen,
    "inpaint": _inpaint,
    "inpaint_concat": _inpaint_concat,
    "img2img": _img2img,
    "cogvideox": _cogvideox,
    "animatediff": _animatediff,
}
