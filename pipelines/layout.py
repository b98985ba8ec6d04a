"""LayoutToImagePipeline: pictures of objects at given places; LayoutPriorPipeline: where objects are, without a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor

from genkit.layouts.encoder import LayoutEncoder
from genkit.layouts.layout import Layout, pack, unpack
from genkit.layouts.prior import LayoutPrior, prior_span, to_layouts, to_samples


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


class LayoutPriorPipeline(DiffusionPipeline):
    """A diffusion model of layouts, as the embedded `scenes-prior`; see `genkit.layouts.prior`.

    Args:
        transformer: the network.
        scheduler: any with the noise levels of DDPM.

    Example:
        >>> prior = LayoutPriorPipeline.from_pretrained(genkit.zoo.path("scenes-prior"))
        >>> prior(4, seed=0)                                # four layouts
        >>> prior.nats([Layout(["seven"], [(0.1, 0.1, 0.4, 0.5)]), Layout(["seven"], [(0.1, 0.1, 0.9, 0.2)])])
    """

    def __init__(self, transformer: LayoutPrior, scheduler: KarrasDiffusionSchedulers) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, count: int = 1, *, seed: int = 0, num_inference_steps: int = 50) -> list[Layout]:
        """Draw layouts.

        Args:
            count: of them.
            seed: layout i is a function of (seed, i), whatever `count` is.
        """
        from genkit.denoisers import Cond, Denoiser
        from genkit.noise import mix
        from genkit.sampling import sample

        if count < 1:
            raise ValueError(f"count={count} must be at least 1.")
        denoiser = Denoiser.of(self)
        shape = denoiser.latent_shape(None, None)
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(mix(seed, i))) for i in range(count)]
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        denoiser.set_timesteps(scheduler, num_inference_steps, shape)
        y = sample(denoiser, scheduler, torch.stack(rows).to(denoiser.device), Cond({}))
        return unpack(to_layouts(y.cpu()), self.transformer.config.class_names)

    @torch.no_grad()
    def nats(self, layouts: Layout | Sequence[Layout] | Tensor, *, pairs: int = 64, batch_size: int = 2048) -> Tensor:
        """-log p(y) (B,) in nats, float64, up to a constant: smaller is likelier.

        All layouts see the same noise, slot by slot: differences are far more exact than the values, above all between layouts that
        have their common objects in the same slots.

        Args:
            layouts: some, or packed (B, N, 5).
            pairs: of noise level and noise.
            batch_size: network evaluations at a time.

        Raises:
            ValueError: a class that the prior does not know, or more objects than it has slots.
        """
        from genkit.denoisers import Cond, Denoiser
        from genkit.scoring import PairPlan
        from genkit.scoring.losses import row_losses

        config = self.transformer.config
        if not isinstance(layouts, Tensor):
            layouts = pack([layouts] if isinstance(layouts, Layout) else layouts, config.class_names, config.slots)
        y0 = to_samples(layouts.float(), len(config.class_names)).to(self.device)
        plan = PairPlan(count=pairs, weighting="elbo", span=(prior_span(self.scheduler), 1.0)).pairs(self.scheduler, y0.shape[1:])
        noise, denoiser = plan.noise(range(pairs)).to(y0), Denoiser.of(self)
        losses = torch.empty(len(y0) * pairs, dtype=torch.float64)
        for rows in torch.arange(len(losses)).split(batch_size):
            i, n = rows // pairs, rows % pairs
            losses[rows] = row_losses(denoiser, y0[i], plan.level[n], noise[n], Cond({})).cpu()
        return (losses.view(len(y0), pairs) * plan.weight).mean(1)
