"""A toolkit around pretrained diffusion models. Importing it imports neither torch nor diffusers."""

from typing import TYPE_CHECKING, Any

from genkit import zoo as zoo
from genkit._lazy import lazy_exports

if TYPE_CHECKING:
    from genkit.denoisers import Denoiser as Denoiser
    from genkit.latents import LatentCodec as LatentCodec
    from genkit.levels import Level as Level
    from genkit.levels import levels_of as levels_of
    from genkit.prediction import Prediction as Prediction
    from genkit.recipe import Recipe as Recipe

_export, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "denoisers": ["Denoiser"],
        "latents": ["LatentCodec"],
        "levels": ["Level", "levels_of"],
        "prediction": ["Prediction"],
        "recipe": ["Recipe"],
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("genkit-diffusion")
    return _export(name)
