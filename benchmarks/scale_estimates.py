"""What large models should cost: parameters and operations counted on the meta device, memory and time estimated from them.

    python benchmarks/scale_estimates.py [--rate 400] [--out benchmarks/results/scale_estimates.json]

Networks are the real diffusers and transformers classes with the published configurations, without weights or memory; a pass over
one sample is counted with torch's `FlopCounterMode`. What follows from that is an estimate that no hardware has verified:

    sampling      bytes = 2 P (bfloat16), of network and text encoders; seconds = steps x c x F / rate, c = 2 with guidance
    classifying   seconds = evaluations x F / rate
    distilling    bytes = (12 + 2) P of the network for all weights (weight, gradient, second moment in float32, teacher in
                  bfloat16; the average, 4 P, is in host memory), or 2 P + 16 L of L parameters of a LoRA of rank 64 on attention;
                  seconds a round = batch x 9 F / rate (7 passes of a fused round of LADD, and 2 of checkpointing)

P parameters, F operations of a pass, `rate` in TFLOP/s: 400 is 40 % of an H100's peak in bfloat16. Activations and the VAE come on
top: 0.1 to 0.3 GB, and for a picture of 512 x 512 2.5 TFLOP to decode.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
RANK = 64
PASSES = 9  # of a fused round of LADD with gradient checkpointing


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its network, what a pass of one sample takes, its text encoders by name, its usual sampling."""

    name: str
    network: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    encoders: tuple[str, ...]
    steps: int
    guided: bool  # two passes a step


def unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(**config)


def sdxl() -> Any:
    return unet(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, in_channels=16, out_channels=16, pos_embed_max_size=192,
    )  # fmt: skip


def flux_inputs(side: int) -> dict[str, Any]:
    tokens = side * side
    return {
        "hidden_states": torch.randn(1, tokens, 64), "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768), "timestep": torch.ones(1), "guidance": torch.ones(1),
        "img_ids": torch.zeros(tokens, 3), "txt_ids": torch.zeros(512, 3),
    }  # fmt: skip


def text_inputs(channels: int, side: int, length: int, width: int, **more: Any) -> dict[str, Any]:
    return {
        "sample": torch.randn(1, channels, side, side), "timestep": torch.ones(1), "text": torch.randn(1, length, width),
    } | more  # fmt: skip


FAMILIES = (
    Family("DiT-XL/2, 256 x 256", lambda: diffusers.DiTTransformer2DModel(out_channels=8, num_embeds_ada_norm=1000),
           lambda: {"hidden_states": torch.randn(1, 4, 32, 32), "timestep": torch.ones(1), "class_labels": torch.ones(1).long()},
           (), 50, True),
    Family("SD 1.5, 512 x 512", lambda: unet(sample_size=64, cross_attention_dim=768),
           lambda: text_inputs(4, 64, 77, 768), ("CLIP-L",), 30, True),
    Family("SDXL, 1024 x 1024", sdxl,
           lambda: text_inputs(4, 128, 77, 2048,
                               added_cond_kwargs={"text_embeds": torch.randn(1, 1280), "time_ids": torch.ones(1, 6)}),
           ("CLIP-L", "CLIP-bigG"), 30, True),
    Family("PixArt-sigma, 1024 x 1024",
           lambda: diffusers.PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=False),
           lambda: {"hidden_states": torch.randn(1, 4, 128, 128), "encoder_hidden_states": torch.randn(1, 300, 4096),
                    "timestep": torch.ones(1), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
           ("T5-XXL",), 20, True),
    Family("Sana 1.6B, 1024 x 1024", lambda: diffusers.SanaTransformer2DModel(sample_size=32),
           lambda: {"hidden_states": torch.randn(1, 32, 32, 32), "encoder_hidden_states": torch.randn(1, 300, 2304),
                    "timestep": torch.ones(1)},
           ("Gemma-2 2B",), 20, True),
    Family("SD3 medium, 1024 x 1024", sd3,
           lambda: {"hidden_states": torch.randn(1, 16, 128, 128), "encoder_hidden_states": torch.randn(1, 333, 4096),
                    "pooled_projections": torch.randn(1, 2048), "timestep": torch.ones(1)},
           ("CLIP-L", "CLIP-bigG", "T5-XXL"), 28, True),
    Family("Flux.1-dev, 1024 x 1024", lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
           lambda: flux_inputs(64), ("CLIP-L", "T5-XXL"), 28, False),
)  # fmt: skip

ENCODERS: dict[str, Callable[[], Any]] = {
    "CLIP-L": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    ),
    "CLIP-bigG": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
    ),
    "T5-XXL": lambda: transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    ),
    "Gemma-2 2B": lambda: transformers.Gemma2Model(transformers.Gemma2Config()),
}


def parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def lora_parameters(network: Any) -> int:
    """Of adapters of rank 64 on the attention's linear layers."""
    layers = [m for n, m in network.named_modules() if n.endswith(LORA_TARGETS) and isinstance(m, torch.nn.Linear)]
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)


def count(family: Family) -> dict[str, Any]:
    """Parameters and operations of a family, without memory."""
    with torch.device("meta"):
        network = family.network().eval()
        inputs = family.inputs()
        if "text" in inputs:
            inputs["encoder_hidden_states"] = inputs.pop("text")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(**inputs)
        encoders = sum(parameters(ENCODERS[name]()) for name in family.encoders)
    return {
        "parameters": parameters(network), "lora": lora_parameters(network), "encoders": encoders,
        "flop": counter.get_total_flops(), "steps": family.steps, "passes": 1 + family.guided,
    }  # fmt: skip


def estimates(counted: dict[str, Any], rate: float) -> dict[str, float]:
    """What the counts say, in GB and seconds; see above."""
    p, f, lora = counted["parameters"], counted["flop"], counted["lora"]
    return {
        "sampling_gb": 2 * (p + counted["encoders"]) / 1e9,
        "image_s": counted["steps"] * counted["passes"] * f / rate / 1e12,
        "thousand_evaluations_s": 1000 * f / rate / 1e12,
        "distil_full_gb": 14 * p / 1e9,
        "distil_lora_gb": (2 * p + 16 * lora) / 1e9,
        "round_of_16_s": 16 * PASSES * f / rate / 1e12,
        "gradient_full_gb": 4 * p / 1e9,
        "gradient_lora_gb": 4 * lora / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=400.0, help="TFLOP/s that are reached")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {family.name: (counted := count(family)) | estimates(counted, arguments.rate) for family in FAMILIES}
    names = ("parameters", "encoders", "flop", *estimates(next(iter(rows.values())), arguments.rate))
    print("| model | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{row[key]:.3g}" for key in names) + " |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"rate": arguments.rate, "verified": False, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
