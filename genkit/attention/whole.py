"""Everything in a pipeline that has attention, called once: what `genkit attention audit` looks at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from genkit import noise
from genkit.attention.auditing import audit
from genkit.attention.report import AttentionReport
from genkit.levels import training_level

if TYPE_CHECKING:
    from genkit.denoisers import Denoiser


def audit_pipeline(
    denoiser: Denoiser, *, backward: bool = False, height: int | None = None, width: int | None = None
) -> AttentionReport:
    """Audit one call of a pipeline's text encoders, network and VAE on one sample.

    Args:
        denoiser: of the pipeline.
        backward: also the backward passes of network and VAE.
        height, width: of the picture in pixels; the model's own by default.

    Raises:
        ValueError: a size that the model does not take, or a conditional model without a null condition.

    Example:
        >>> audit_pipeline(Denoiser.of(pipe), backward=True).unfused
    """
    from genkit.features.extractor import null_condition

    shape = denoiser.latent_shape(height, width)
    level = training_level(denoiser.pipe.scheduler, [0.5])

    def once() -> None:
        cond = null_condition(denoiser)
        x = noise.normal([0], shape).to(denoiser.device).requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            outputs = [denoiser(x, level, cond).raw]
            if denoiser.codec is not None:
                picture = denoiser.decode(x)
                outputs += [picture, denoiser.encode(picture)]
        if backward:
            torch.autograd.grad(torch.stack([output.float().square().mean() for output in outputs]).sum(), x)

    return audit(once, denoiser)
