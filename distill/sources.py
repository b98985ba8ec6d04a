"""What a discriminator looks at: features of a frozen network, through which gradients reach the samples.

    TeacherTaps    LADD: the teacher's own activations at x_u = alpha_u x0 + sigma_u eps      (Sauer et al. 2024, arXiv 2403.12015)
    PixelEncoder   ADD: an image encoder's activations at the decoded picture                 (Sauer et al. 2023, arXiv 2311.17042)

Both end the pass at the deepest tap, keep their network in eval mode, and give no gradients to its parameters.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.attention.proof import check
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.base import network_name
from genkit.denoisers.modes import evaluating
from genkit.distill.augment import DRAWS, diff_augment
from genkit.distill.config import TAP_SETS
from genkit.distill.path import Path
from genkit.distill.resident import called, only, with_components
from genkit.features.extractor import null_condition
from genkit.features.taps import Tap, as_map, blocks_of, collect, resolve_taps
from genkit.latents import LatentCodec


class FeatureSource(ABC):
    """Maps of features of clean samples.

    Attributes:
        taps: the places that are read; `names` are what the user calls them.
        noisy: whether features are those of noised samples, so that heads should know the noise level.
    """

    taps: list[Tap]
    noisy: bool

    @property
    def names(self) -> list[str]:
        return [tap.name for tap in self.taps]

    @property
    @abstractmethod
    def channels(self) -> list[int]:
        """C of each tap's maps."""

    @abstractmethod
    def __call__(
        self,
        x0: Tensor,
        cond: Cond | None = None,
        u: Tensor | None = None,
        eps: Tensor | None = None,
        perturbation: Tensor | float = 0.0,
    ) -> list[Tensor]:
        """Maps (B, C, h, w), float32, of each tap; tokens of no grid are (B, C, L, 1), and vectors (B, C, 1, 1).

        Args:
            x0: clean samples (B, ...); gradients flow to them where they are on.
            cond: condition of the B samples.
            u: (B,) noise levels as fractions of the training time.
            eps: noise (B, ...), standard normal: all that is random in the features.
            perturbation: added to what is looked at, for `genkit.distill.losses.approximate_r1`.

        Raises:
            ValueError: no level or no noise where they are needed.
        """


class TeacherTaps(FeatureSource):
    """Activations of a frozen denoiser at noised samples.

    Args:
        denoiser: the teacher; its network is frozen in place.
        taps: "quarter": the middle block of each quarter of the depth, and the last block. "half": four blocks, evenly from the
            first to the one in the middle of the depth; in a UNet they are those of the encoder. "all": every block. Or names,
            module paths or positions of blocks, see `genkit.features.taps`.
        path: the noise levels; by default those of the denoiser's scheduler.
        shape, cond: shape of a clean sample and condition of one, from which `channels` are found; by default the model's own size
            and the null condition.

    Raises:
        ValueError: a tap that the network does not have, or a network without blocks that are known.

    Example:
        >>> source = TeacherTaps(pipe.denoiser, "quarter")
        >>> features = source(x0, cond, u, eps)             # of x0 (B, c, h, w), at levels u (B,)
    """

    noisy = True

    def __init__(
        self,
        denoiser: Denoiser,
        taps: str | Sequence[str | int] = "quarter",
        path: Path | None = None,
        *,
        shape: Sequence[int] | None = None,
        cond: Cond | None = None,
    ) -> None:
        denoiser.network.eval().requires_grad_(False)
        self.denoiser = denoiser
        self.path = Path(denoiser.pipe.scheduler) if path is None else path
        self.taps = resolve_taps(denoiser.network, _blocks(denoiser.network, taps) if taps in TAP_SETS else taps)
        self._shape, self._cond = shape, cond

    @functools.cached_property
    def channels(self) -> list[int]:
        return [value.shape[1] for value in self._example()]

    def strip(self) -> Denoiser:
        """Do without what lies behind the deepest tap, and return the denoiser that is left; the one that was given stays whole.

        It is tried: a network whose features differ afterwards is kept as it was.
        """
        whole, expected = self.denoiser, self._example()
        kept = called(whole.network, self._example)
        self.denoiser = with_components(whole, **{network_name(whole.pipe): only(whole.network, kept)})
        try:
            same = all(torch.equal(a, b) for a, b in zip(self._example(), expected, strict=True))
        except (AttributeError, RuntimeError):  # weights that are used without a call of their module
            same = False
        if not same:
            self.denoiser = whole
        return self.denoiser

    @torch.no_grad()
    def _example(self) -> list[Tensor]:
        """The features of one sample."""
        shape = self.denoiser.latent_shape(None, None) if self._shape is None else self._shape
        cond = null_condition(self.denoiser) if self._cond is None else self._cond
        x0 = torch.zeros(1, *shape, device=self.denoiser.device)
        return self(x0, cond, torch.tensor([0.5]), x0)

    def __call__(
        self,
        x0: Tensor,
        cond: Cond | None = None,
        u: Tensor | None = None,
        eps: Tensor | None = None,
        perturbation: Tensor | float = 0.0,
    ) -> list[Tensor]:
        if u is None or eps is None:
            raise ValueError("The teacher's features are those of noised samples. Give levels u (B,) and noise eps like x0.")
        x, level = self.path.add_noise(x0, eps, u)
        x = x + perturbation
        with evaluating(self.denoiser.network):
            found = collect(self.denoiser.network, self.taps, lambda: self.denoiser(x, level, cond))
        return [_as_map(value, x0.shape) for value in found.values()]


class PixelEncoder(FeatureSource):
    """Activations of a frozen image encoder at decoded samples, augmented, cropped or resized, and normalised.

    Args:
        encoder: any network of pictures (B, 3, size, size); it is frozen in place. Never the judge that measures the student.
        codec: of the latents, `denoiser.codec`; its VAE is frozen in place. None for samples that are pictures.
        taps: module paths in the encoder, as "blocks.5".
        size: side of the pictures that the encoder gets. Of larger ones, half are cut to this size and half shrunk to it; smaller
            ones are enlarged. Pictures that are not square are cut at random after that.
        mean, std: per-channel statistics that the encoder expects of pictures in [0, 1]; .5 leaves them in [-1, 1].
        prefix: tokens before those of patches. The first of them, the class token, is added to each patch, the others are left out.
        augment: see `genkit.distill.augment`. Augmentations and cuts are functions of the eps of the call, so that a sample's do
            not depend on the batch or the process that it is in.

    Raises:
        ValueError: a tap that the encoder does not have.

    Example:
        >>> classifier = load_classifier("digits-classifier")
        >>> source = PixelEncoder(classifier, pipe.denoiser.codec, ["blocks.1", "blocks.2", "blocks.3"], size=32)
        >>> source = PixelEncoder.timm("vit_small_patch14_dinov2", pipe.denoiser.codec)
    """

    noisy = False

    def __init__(
        self,
        encoder: nn.Module,
        codec: LatentCodec | None,
        taps: Sequence[str | int],
        *,
        size: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        prefix: int = 0,
        augment: bool = True,
    ) -> None:
        encoder.eval().requires_grad_(False)
        check(encoder)
        if codec is not None:
            codec.vae.eval().requires_grad_(False)
        self.taps = resolve_taps(encoder, taps)
        self.encoder, self.codec, self.size, self.prefix, self.augment = encoder, codec, size, prefix, augment
        self.mean, self.std = (torch.tensor(list(v)).reshape(-1, 1, 1) for v in (mean, std))

    @classmethod
    def timm(
        cls,
        model: str | nn.Module,
        codec: LatentCodec | None,
        taps: Sequence[int | str] = (2, 5, 8, 11),
        *,
        size: int | None = None,
        augment: bool = True,
        **options: Any,
    ) -> PixelEncoder:
        """A vision transformer of timm. ADD's is "vit_small_patch14_dinov2", StyleGAN-T's "vit_small_patch16_224.dino".

        Args:
            model: its name, or one that is there.
            taps: numbers of blocks, from 0, or module paths. ("pos_drop" is the embedded tokens, StyleGAN-T's fifth tap.)
            size: side of the pictures, a multiple of the patch; by default the model's own.
            options: of `timm.create_model`, for instance `pretrained=False`.
        """
        import timm

        if isinstance(model, str):
            sizes = {} if size is None else {"img_size": size}
            model = timm.create_model(model, **{"pretrained": True, "num_classes": 0} | sizes | options)
        network: Any = model
        return cls(
            network,
            codec,
            [f"blocks.{tap}" if isinstance(tap, int) else tap for tap in taps],
            size=network.patch_embed.img_size[0],
            mean=network.pretrained_cfg["mean"],
            std=network.pretrained_cfg["std"],
            prefix=network.num_prefix_tokens,
            augment=augment,
        )

    @functools.cached_property
    def channels(self) -> list[int]:
        with torch.no_grad():
            pictures = torch.zeros(1, 3, self.size, self.size, device=next(self.encoder.parameters()).device)
            return [value.shape[1] for value in self._maps(pictures)]

    def __call__(
        self,
        x0: Tensor,
        cond: Cond | None = None,
        u: Tensor | None = None,
        eps: Tensor | None = None,
        perturbation: Tensor | float = 0.0,
    ) -> list[Tensor]:
        if eps is None:
            raise ValueError("Augmentations and cuts are drawn from the noise. Give eps like x0.")
        pictures = self._pictures(x0 + perturbation)
        draws = torch.special.ndtr(eps.flatten(1)[:, : DRAWS + 3].double().cpu()).T.clamp(max=1 - 1e-9)
        if self.augment:
            pictures = diff_augment(pictures, draws[3:])
        fitted = [self._fitted(picture[None], *draw) for picture, draw in zip(pictures, draws[:3].T.tolist(), strict=True)]
        return self._maps(torch.cat(fitted))

    def embed(self, x0: Tensor) -> Tensor:
        """One vector (B, C) for each sample, from the last tap: its class token, or the mean of its map. For conditioning heads."""
        with torch.no_grad():
            value = self._read(self._fitted(self._pictures(x0), 0.0, 0.5, 0.5), self.taps[-1:])[0]
            return (value[:, 0] if self.prefix else _as_map(value, (self.size, self.size)).mean((2, 3))).float()

    def _pictures(self, x0: Tensor) -> Tensor:
        """Pictures in [-1, 1] of samples."""
        if self.codec is None:
            return x0
        with evaluating(self.codec.vae):
            return self.codec.decode(x0)

    def _fitted(self, x: Tensor, way: float, top: float, left: float) -> Tensor:
        """Pictures (B, 3, size, size), cut at fractions `top` and `left` of what is too much, and shrunk before if `way` < .5."""
        size, short = self.size, min(x.shape[-2:])
        if short < size or (short > size and way < 0.5):
            sides = [round(side * size / short) for side in x.shape[-2:]]
            x = F.interpolate(x, sides, mode="area") if short > size else F.interpolate(x, sides, mode="bilinear")
        row, column = round(top * (x.shape[-2] - size)), round(left * (x.shape[-1] - size))
        return x[..., row : row + size, column : column + size]

    def _read(self, pictures: Tensor, taps: list[Tap]) -> list[Tensor]:
        """What passes the taps for pictures (B, 3, size, size) in [-1, 1]."""
        x = ((pictures + 1) / 2 - self.mean.to(pictures)) / self.std.to(pictures)
        x = x.to(next(self.encoder.parameters()).dtype)
        with evaluating(self.encoder):
            return list(collect(self.encoder, taps, lambda: self.encoder(x)).values())

    def _maps(self, pictures: Tensor) -> list[Tensor]:
        values = self._read(pictures, self.taps)
        if self.prefix:
            values = [value[:, self.prefix :] + value[:, :1] if value.ndim == 3 else value for value in values]
        return [_as_map(value, pictures.shape) for value in values]


def _blocks(network: nn.Module, taps: str | Sequence[str | int]) -> list[str]:
    """The names of the blocks that one of `TAP_SETS` means."""
    blocks = blocks_of(network)
    count = len(blocks)
    if not count:
        raise ValueError(f"{type(network).__name__} has no blocks that genkit knows. Give taps as module paths, not {taps!r}.")
    if taps == "all":
        return blocks
    if taps == "half":
        middle = (count + 1) // 2
        return [blocks[i] for i in sorted({math.ceil(part * middle / 4) - 1 for part in range(1, 5)})]
    return [blocks[i] for i in sorted({*((2 * quarter + 1) * count // 8 for quarter in range(4)), count - 1})]


def _as_map(value: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w), float32, of an activation for samples whose last two sides are (h, w) of `size`."""
    if value.ndim == 3:
        value = as_map(value, (size[-2], size[-1]))
    if value.ndim == 3:
        value = value.transpose(1, 2).unsqueeze(-1)
    if value.ndim == 2:
        value = value[..., None, None]
    if value.ndim != 4:
        raise ValueError(f"A tap gives {tuple(value.shape)}, which is no map (B, C, h, w), no tokens and no vector. Name another.")
    return value.float()
