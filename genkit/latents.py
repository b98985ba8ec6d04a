"""LatentCodec: pixels in [-1, 1] to the latents that a diffusion model sees, and back.

    encode: (z - shift) * scale         decode: z / scale + shift

with per-channel mean and standard deviation where a VAE has them: (z - mean) * scale / std.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LatentCodec:
    """A VAE with its scale and shift.

    Args:
        vae: any diffusers autoencoder (AutoencoderKL, AutoencoderDC, AutoencoderTiny, ...).
        scale: `scaling_factor` of its configuration.
        shift: `shift_factor`, or 0.
        mean, std: per-channel statistics (`latents_mean`, `latents_std`), or None.
        factor: how many pixels make one latent, along a side.

    Gradients flow through both directions. Tiled decoding has another gradient (its normalisation statistics are per tile),
    so it is left as the VAE has it and never turned on here. A float16 VAE that says it overflows (`force_upcast`, as SDXL's)
    works as a float32 copy; the pipeline's own is not touched, as weights that change between forward and backward break gradients.
    """

    vae: Any
    scale: float
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    factor: int = 8

    @classmethod
    def of(cls, pipe: Any) -> LatentCodec | None:
        """The codec of a diffusers pipeline; None for a pixel-space model."""
        vae = getattr(pipe, "vae", None)
        if vae is None:
            vae = getattr(pipe, "vqvae", None)
        return None if vae is None else cls.from_vae(vae)

    @classmethod
    def from_vae(cls, vae: Any) -> LatentCodec:
        """Read scale, shift and factor from a VAE's configuration."""
        config = vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,)
        factor = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(blocks) - 1)
        return cls(
            vae,
            scale=float(config.get("scaling_factor") or 1.0),
            shift=float(config.get("shift_factor") or 0.0),
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
            factor=int(factor),
        )

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, c, h, w) of images (B, 3, H, W) in [-1, 1]: the posterior's mean, or a sample with a generator."""
        vae = self._working_vae()
        output = vae.encode(images.to(vae.dtype))
        if not hasattr(output, "latent_dist"):
            z = output.latent if hasattr(output, "latent") else output.latents
        elif generator is None:
            z = output.latent_dist.mode()
        else:
            z = output.latent_dist.sample(generator)
        shift, scale = self._affine(z)
        return ((z - shift) * scale).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about in [-1, 1], of latents (B, c, h, w)."""
        shift, scale = self._affine(latents)
        z = latents / scale + shift
        vae = self._working_vae()
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].to(latents.dtype)

    def _working_vae(self) -> Any:
        """The VAE in a precision in which it does not overflow."""
        if self.vae.dtype != torch.float16 or not self.vae.config.get("force_upcast"):
            return self.vae
        return self._float32_vae.to(self.vae.device)

    @functools.cached_property
    def _float32_vae(self) -> Any:
        return copy.deepcopy(self.vae).float()

    def _affine(self, z: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if self.mean is None or self.std is None:
            return self.shift, self.scale
        shape = (1, -1, *[1] * (z.ndim - 2))
        mean, std = (z.new_tensor(v).view(shape) for v in (self.mean, self.std))
        return mean, self.scale / std
