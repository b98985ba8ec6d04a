"""The forms in which pipelines keep their samples, against the one that a guidance sees.

    pictures  (B, C, h, w)                              most pipelines
    halves    (2B, C, h, w), both halves equal          DiT, whose loop keeps the batch of classifier-free guidance
    packed    (B, h w / 4, 4 C)                         Flux and its relatives: 2 x 2 latents make a token
    videos    (B, C, T, h, w) or (B, T, C, h, w)        the latter in CogVideoX

A guidance sees (B, C, h, w), or (B, C, T, h, w).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from genkit.denoisers.flux import pack, unpack
from genkit.latents import LatentCodec


@dataclasses.dataclass(frozen=True)
class Form:
    """How a pipeline keeps a sample.

    Args:
        doubled: as two equal halves.
        rows: number of rows of tokens, if it is packed.
        frames_first: frames before channels.
    """

    doubled: bool = False
    rows: int | None = None
    frames_first: bool = False

    def view(self, x: Tensor) -> Tensor:
        """As a guidance sees it."""
        x = x[: len(x) // 2] if self.doubled else x
        if self.rows is not None:
            return unpack(x, self.rows)
        return x.transpose(1, 2) if self.frames_first else x

    def back(self, x: Tensor) -> Tensor:
        """As the pipeline keeps it."""
        if self.rows is not None:
            x = pack(x)
        elif self.frames_first:
            x = x.transpose(1, 2)
        return torch.cat([x, x]) if self.doubled else x


class FormReader:
    """Tells the form of a pipeline's samples from their shape, its VAE and the token positions that its network is told."""

    def __init__(self, pipe: Any, height: int | None, width: int | None) -> None:
        self.pipe, self.height, self.width = pipe, height, width
        self.codec = cast(PipelineCodec | None, PipelineCodec.of(pipe))
        self.doubles = any(ancestor.__name__ == "DiTPipeline" for ancestor in type(pipe).__mro__)
        self._positions: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes the token positions that the network is called with."""
        network = getattr(self.pipe, "transformer", None)
        if not isinstance(network, nn.Module):
            yield
            return

        def note(module: nn.Module, args: Any, keywords: dict[str, Any]) -> None:
            self._positions = keywords.get("img_ids")

        handle = network.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def form(self, sample: Tensor, output: Tensor | None = None) -> Form:
        """The form of a sample, and of the model output if there is one yet.

        Raises:
            ValueError: packed latents of unknown size, or a size that does not fit them.
        """
        channels = None if self.codec is None else self.codec.channels
        if self.doubles and _is_doubled(sample) and (output is None or _is_doubled(output)):
            return Form(doubled=True)
        if sample.ndim == 3 and channels is not None and sample.shape[-1] == 4 * channels:
            return Form(rows=self._rows(sample.shape[1]))
        if sample.ndim == 5 and channels is not None and sample.shape[1] != channels == sample.shape[2]:
            return Form(frames_first=True)
        return Form()

    def _rows(self, tokens: int) -> int:
        assert self.codec is not None
        if self.height is not None and self.width is not None:
            rows, columns = (side // (2 * self.codec.factor) for side in (self.height, self.width))
            if rows * columns != tokens:
                raise ValueError(
                    f"Pictures of height={self.height} and width={self.width} have {rows} x {columns} tokens, but the pipeline has "
                    f"{tokens}. Give attach the size that the pipeline is called with."
                )
            return rows
        if self._positions is None:
            raise ValueError(
                f"The pipeline packs its latents into {tokens} tokens and does not tell the network their positions. "
                "Give attach the size of the pictures: height=..., width=..., in pixels."
            )
        # The tokens of reference pictures come after those of the sample.
        return int(self._positions.reshape(-1, self._positions.shape[-1])[:tokens, 1].max()) + 1


def _is_doubled(x: Tensor) -> bool:
    return len(x) % 2 == 0 and torch.equal(*x.chunk(2))


class PipelineCodec(LatentCodec):
    """The codec of a pipeline, for pictures and videos."""

    @property
    def channels(self) -> int | None:
        """Channels of the latents, if the VAE says so."""
        config = self.vae.config
        return config.get("latent_channels") or config.get("z_dim")

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, c, h, w), or videos (B, 3, T, H, W) of (B, c, t, h, w), about in [-1, 1].

        A VAE of pictures decodes each frame of a video.

        Raises:
            ValueError: latents in another form than the VAE decodes.
        """
        decodes_videos = any(isinstance(module, nn.Conv3d) for module in self.vae.modules())
        wants_count = "num_frames" in inspect.signature(self.vae.decode).parameters  # Stable Video Diffusion
        fits = latents.ndim == 5 or (latents.ndim == 4 and not decodes_videos)
        if not fits or wants_count or self.channels not in (None, latents.shape[1]):
            raise ValueError(
                f"The pipeline's samples, {tuple(latents.shape)}, are in a form that genkit does not decode with "
                f"{type(self.vae).__name__}. Use an energy of space='latent'."
            )
        if latents.ndim == 4 or decodes_videos:
            return super().decode(latents)
        frames = super().decode(latents.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)
