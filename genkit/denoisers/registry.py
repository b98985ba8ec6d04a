"""Which adapter serves which pipeline: by the name of its class, or of a class it derives from.

The table holds names, so that looking up one family imports that family alone, and listing them imports none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from genkit.denoisers.base import Denoiser

_BUILT_IN = {  # pipeline class -> module of this package, adapter
    "DDPMPipeline": ("unet2d", "UNet2DDenoiser"),
    "DDIMPipeline": ("unet2d", "UNet2DDenoiser"),
    "DiTPipeline": ("dit", "DiTDenoiser"),
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusionDenoiser"),
    "StableDiffusionImg2ImgPipeline": ("stable_diffusion", "StableDiffusionDenoiser"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXLDenoiser"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3Denoiser"),
    "FluxPipeline": ("flux", "FluxDenoiser"),
    "PixArtAlphaPipeline": ("pixart", "PixArtDenoiser"),
    "PixArtSigmaPipeline": ("pixart", "PixArtDenoiser"),
    "SanaPipeline": ("sana", "SanaDenoiser"),
    "StableDiffusionGLIGENPipeline": ("gligen", "GligenDenoiser"),
    "LayoutToImagePipeline": ("layout", "LayoutDenoiser"),
    "LayoutPriorPipeline": ("layout", "LayoutPriorDenoiser"),
}
_registered: dict[str, type[Denoiser]] = {}

Adapter = TypeVar("Adapter", bound="type[Denoiser]")


def register(adapter: Adapter) -> Adapter:
    """Make `find` know an adapter, for the pipelines named in its `classes`; a later one replaces an earlier one.

    Returns the adapter, so it serves as a class decorator.
    """
    for name in adapter.classes:
        _registered[name] = adapter
    return adapter


def find(pipe: Any) -> type[Denoiser]:
    """The adapter class of a diffusers pipeline.

    Raises:
        ValueError: no adapter is known for its class; the message lists the supported ones.
    """
    return find_for(type(pipe))


def find_for(pipeline_class: type) -> type[Denoiser]:
    """The adapter class of a class of pipelines; raises as `find` does."""
    for ancestor in pipeline_class.__mro__:
        name = ancestor.__name__
        if name in _registered:
            return _registered[name]
        if name in _BUILT_IN:
            module, adapter = _BUILT_IN[name]
            return getattr(import_module(f"genkit.denoisers.{module}"), adapter)
    supported = ", ".join(sorted({*_BUILT_IN, *_registered}))
    raise ValueError(
        f"{pipeline_class.__name__} is not supported. Supported: {supported}. "
        "An adapter takes about 40 lines: see the example at the top of genkit/denoisers/base.py."
    )
