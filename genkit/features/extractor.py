"""Features of a frozen diffusion network: noise the image, run the network as far as needed, read its activations.

    x_t = alpha_t x0 + sigma_t eps,        features_b(x0, t, eps) = activation of block b of the network at (x_t, t)

Mukhopadhyay et al. 2023, arXiv 2307.08702 ("Diffusion Models Beat GANs on Image Classification"), and arXiv 2311.17921, on several
blocks and noise levels. The published code runs the whole network; here the pass ends at the deepest tap, with the same bits.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit import noise as noises
from genkit.attention.proof import Proof
from genkit.denoisers import Cond, Denoiser
from genkit.denoisers.base import with_network
from genkit.denoisers.modes import evaluating
from genkit.denoisers.text import TextDenoiser
from genkit.features.taps import Tap, as_map, collect, resolve_taps
from genkit.levels import Level, training_level


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """What a tap gives, for one image and one noise level, before pooling.

    Args:
        name: of the tap.
        module: path of the module whose output it is.
        shape: (C, h, w) of a map; (L, C) or (C,) of what is none.
        channels: C.
        reduction: pixels of the image for one step in the map, along a side; None of what is no map.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    channels: int
    reduction: float | None


class FeatureExtractor:
    """Activations of a pretrained diffusion network, which is only read.

    Args:
        denoiser: the model.
        taps: names, module paths or positions of blocks, one or several; see `genkit.features.taps`. All come from one pass.
        t: time of the noise on the image, in timesteps of the training (0 to 999 mostly); several give one pass each. 150 is that
            of the released ADM-256 scripts, with block 24; the paper's ImageNet-50 sweep prefers 90.
        noise: "fixed": the same noise for every image, so that features depend on the image alone; or a number of draws, made anew
            for each image from its index, whose features are averaged.
        pool: average maps to at most so many steps along a side, or "mean" for one vector; None keeps them.
        early_exit: stop the network after the deepest tap. The features are the same bit for bit.
        seed: of the noise.

    Attributes:
        taps: the places, in the order given.
        draws: number of draws that are averaged.
        levels: the noise level of each t.
        proof: what attention was computed with.

    Raises:
        ValueError: a tap that the network does not have, a time out of range, no draws, or an unknown pooling.

    Example:
        >>> extractor = FeatureExtractor(pipe.denoiser, ["mid", "block.6"], t=100, pool=2)
        >>> extractor(images)["mid"]                        # (B, C, 2, 2), images (B, 3, H, W) in [-1, 1]
        >>> extractor.feature_info[0].channels
    """

    def __init__(
        self,
        denoiser: Denoiser,
        taps: str | int | Sequence[str | int],
        *,
        t: int | Sequence[int] = 150,
        noise: Literal["fixed"] | int = "fixed",
        pool: int | Literal["mean"] | None = None,
        early_exit: bool = True,
        seed: int = 0,
    ) -> None:
        if noise != "fixed" and (not isinstance(noise, int) or noise < 1):
            raise ValueError(f"noise={noise!r} must be 'fixed' or a number of draws, at least 1.")
        if pool is not None and pool != "mean" and (not isinstance(pool, int) or pool < 1):
            raise ValueError(f"pool={pool!r} must be a number of steps along a side, at least 1, 'mean' or None.")
        self.denoiser, self.noise, self.pool, self.early_exit, self.seed = denoiser, noise, pool, early_exit, seed
        self.taps: list[Tap] = resolve_taps(denoiser.network, taps)
        self.several = not isinstance(t, int)
        self.t: tuple[int, ...] = (t,) if isinstance(t, int) else tuple(t)
        self.draws = 1 if noise == "fixed" else noise
        self.proof = Proof(denoiser)
        self.levels = [_level(denoiser.pipe.scheduler, value) for value in self.t]
        if not self.levels:
            raise ValueError("No times were given. Give at least one t.")

    def __call__(
        self,
        images: Tensor | None = None,
        cond: Cond | None = None,
        *,
        latents: Tensor | None = None,
        indices: Sequence[int] | None = None,
        inject: Mapping[str, Tensor] | None = None,
        grad: bool = False,
    ) -> dict[str, Tensor]:
        """Features of a batch, by the names of the taps.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            cond: condition of the B samples; by default the null condition, or none for an unconditional model.
            latents: clean samples (B, c, h, w) as `encode` gives them, instead of images.
            indices: number of each image, which its noise depends on if `noise` is a number of draws; by default 0 to B - 1.
            inject: tensors (B, C, h, w) to add to activations, by tap.
            grad: keep the graph, to images, latents and injected tensors.

        Returns:
            float32 tensors: (B, C, h, w) for a map, (B, C, p, p) or (B, C) if pooled; with several t (B, T, ...).

        Raises:
            ValueError: neither or both of images and latents, wrong shapes, or a tap that did not run.
        """
        with torch.set_grad_enabled(grad), evaluating(self.denoiser.network):
            x0 = self._clean(images, latents)
            draws = [self.draw(x0, k, cond, indices=indices, inject=inject) for k in range(self.draws)]
            return draws[0] if len(draws) == 1 else {name: torch.stack([d[name] for d in draws]).mean(0) for name in draws[0]}

    def encode(self, images: Tensor) -> Tensor:
        """Clean samples (B, c, h, w) of images (B, 3, H, W) in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}, but (B, 3, H, W) in [-1, 1] is needed.")
        return self.denoiser.encode(images.to(self.denoiser.device))

    def draw(
        self,
        x0: Tensor,
        k: int = 0,
        cond: Cond | None = None,
        *,
        indices: Sequence[int] | None = None,
        inject: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Features of clean samples x0 (B, c, h, w) under the k-th draw of the noise; as the call otherwise."""
        eps = self._noise(x0, k, indices)
        cond = self._null.repeat(len(x0)) if cond is None else cond
        with self.proof, self.proof.step(tuple(x0.shape), str(x0.dtype), torch.is_grad_enabled()):
            passes = [self._run(self.denoiser, x0, eps, level, cond, inject) for level in self.levels]
        features = [{name: self._pooled(value) for name, value in found.items()} for found in passes]
        if not self.several:
            return features[0]
        return {tap.name: torch.stack([f[tap.name] for f in features], dim=1) for tap in self.taps}

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that the model was made for."""
        _, height, width = self.denoiser.latent_shape(None, None)
        return height * self.denoiser.factor, width * self.denoiser.factor

    @functools.cached_property
    def feature_info(self) -> list[FeatureInfo]:
        """What each tap gives for pictures of the model's own size."""
        return self.info()

    def info(self, height: int | None = None, width: int | None = None) -> list[FeatureInfo]:
        """What each tap gives for pictures of a size in pixels; found on the meta device, without computation.

        Raises:
            ValueError: a size that the model does not take.
        """
        shape = self.denoiser.latent_shape(height, width)
        x0 = torch.zeros(1, *shape, device="meta")
        with torch.no_grad(), evaluating(self.denoiser.network):
            shell = _on_meta(self.denoiser)
            found = self._run(shell, x0, x0, self.levels[0], self._null.to("meta"), None)
        infos = []
        for tap in self.taps:
            dims = tuple(found[tap.name].shape[1:])
            channels, reduction = (dims[0], shape[1] * self.denoiser.factor / dims[1]) if len(dims) == 3 else (dims[-1], None)
            infos.append(FeatureInfo(tap.name, tap.module, dims, channels, reduction))
        return infos

    def pooled_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after pooling of what a tap gives for one image."""
        return tuple(self._pooled(torch.empty(1, *shape, device="meta")).shape[1:])

    @functools.cached_property
    def _null(self) -> Cond:
        return null_condition(self.denoiser)

    def _clean(self, images: Tensor | None, latents: Tensor | None) -> Tensor:
        if (images is None) == (latents is None):
            raise ValueError("Give either images or latents.")
        if images is not None:
            return self.encode(images)
        assert latents is not None
        if latents.ndim != 4:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, but (B, c, h, w) is needed.")
        return latents.to(self.denoiser.device)

    def _noise(self, x0: Tensor, k: int, indices: Sequence[int] | None) -> Tensor:
        """eps (B, c, h, w): a function of (seed, k, index) alone, or of the seed where it is fixed."""
        if indices is not None and len(indices) != len(x0):
            raise ValueError(f"There are {len(indices)} indices for {len(x0)} images. Give one for each.")
        key = noises.mix(self.seed, noises.SCORING + k) << 32
        if self.noise == "fixed":
            return noises.normal([key], x0.shape[1:], noises.SCORING).to(x0).expand_as(x0)
        numbers = range(len(x0)) if indices is None else indices
        return noises.normal([key | i for i in numbers], x0.shape[1:], noises.SCORING).to(x0)

    def _run(
        self, denoiser: Denoiser, x0: Tensor, eps: Tensor, level: Level, cond: Cond, inject: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        def run() -> Any:
            return denoiser(level.diffuse(x0, eps), level, cond)

        found = collect(denoiser.network, self.taps, run, early_exit=self.early_exit, inject=inject)
        return {name: as_map(value, (x0.shape[-2], x0.shape[-1])) if value.ndim == 3 else value for name, value in found.items()}

    def _pooled(self, value: Tensor) -> Tensor:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.pool is None or value.ndim == 2:
            return value
        if self.pool == "mean":
            return value.mean((2, 3) if value.ndim == 4 else 1)
        if value.ndim != 4:
            raise ValueError(f"pool={self.pool} is for maps (B, C, h, w), but a tap gives {tuple(value.shape)}. Use pool='mean'.")
        return shrink(value, self.pool)


def shrink(value: Tensor, side: int) -> Tensor:
    """Maps (B, C, h, w) averaged to at most `side` steps along each side."""
    height, width = min(side, value.shape[-2]), min(side, value.shape[-1])
    return value if (height, width) == value.shape[-2:] else F.adaptive_avg_pool2d(value, (height, width))


def null_condition(denoiser: Denoiser) -> Cond:
    """The null condition of one sample: the empty prompt, the null class, or nothing for an unconditional model.

    Raises:
        ValueError: a conditional model that has none.
    """
    if isinstance(denoiser, TextDenoiser):
        return denoiser.condition("").null()
    if getattr(denoiser, "num_classes", None) is None:
        return Cond({})
    cond = denoiser.condition(labels=0)
    if cond.null_tensors is None:
        raise ValueError("This model has no null condition. Pass the condition: cond=denoiser.condition(...).")
    return cond.null()


def _level(scheduler: Any, t: int) -> Level:
    count = scheduler.config.num_train_timesteps
    if not 0 <= t < count:
        raise ValueError(f"t={t} is out of range. Give a timestep from 0 up to {count - 1}.")
    # The middle of timestep t, so that rounding cannot take it for its neighbour.
    return training_level(scheduler, [(t + 0.5) / count])


def _on_meta(denoiser: Denoiser) -> Denoiser:
    """The same adapter on a copy of its network without memory."""
    network = denoiser.network
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in network.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in network.buffers()}
    return with_network(denoiser, copy.deepcopy(network, memo), torch.device("meta"))
