"""LayoutToImagePipeline: pictures of objects at given places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers

from genkit.layouts.encoder import LayoutEncoder
from genkit.layouts.layout import Layout


class LayoutToImagePipeline(DiffusionPipeline):
    """A latent diffusion model that is conditioned on a layout, as the embedded `scenes`.

    Args:
        vae: the autoencoder of the latents.
        unet: takes latents and two channels of coordinates, and reads the layout by cross-attention.
        layout_encoder: what it reads.
        scheduler: any with the noise levels of DDPM.

    Example:
        >>> pipe = GuidedPipeline.from_pretrained("scenes")
        >>> layout = Layout(["seven", "two"], [(0.1, 0.1, 0.4, 0.5), (0.5, 0.5, 0.9, 0.9)])
        >>> pipe(layouts=layout, seeds=range(4)).images
    """

    model_cpu_offload_seq = "layout_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        layout_encoder: LayoutEncoder,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, layout_encoder=layout_encoder, scheduler=scheduler)

    def __call__(self, layouts: Layout | Sequence[Layout], **arguments: Any) -> Any:
        """Generate a picture of each layout; the arguments and the result are those of `GuidedPipeline`."""
        from genkit.pipelines.guided import GuidedPipeline

        return GuidedPipeline(self)(layouts=layouts, **arguments)
