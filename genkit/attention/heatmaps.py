"""Heat maps: how much each place of an image attends to each word of its prompt, recorded while it is sampled.

    m_w(i) = sum over the tokens j of word w of p_ij,      p = softmax(q k^T / sqrt(D)), i a place of the image

averaged over heads, layers and noise levels, each layer's map enlarged to the finest grid (as DAAM does: Tang et al. 2022,
arXiv 2210.04885). A map is a share of attention, 0 to 1; over all tokens of the text, padding included, cross-attention sums to 1
at each place. In joint attention (SD3, Flux) the rest goes to the image itself.

The maps are row statistics (`genkit.attention.statistics`), one more fused call for each that is watched; outputs keep their bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.attention.statistics import row_statistic
from genkit.attention.watching import Attention, watching
from genkit.denoisers.base import Cond, Denoiser
from genkit.denoisers.text import TextDenoiser
from genkit.denoisers.words import chosen_words, word_positions
from genkit.errors import unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageMaps:
    """The maps of one image, on the CPU.

    Args:
        words: its W words, in lower case.
        mean: (W, h, w), averaged over layers and noise levels, on the grid of the latents (of their patches).
        layers: (W, h, w) of each attention module that reads the text, in the order in which they run, each on its own grid.
        levels: (timestep, maps (W, h, w)) of each noise level, averaged over layers.
    """

    words: tuple[str, ...]
    mean: Tensor
    layers: dict[str, Tensor]
    levels: list[tuple[float, Tensor]]

    def of(self, word: str, *, layer: str | None = None, level: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """The map (h, w) of a word.

        Args:
            word: one of `words`, case ignored.
            layer: of this layer alone, a name of `layers`.
            level: of this one of `levels` alone, from 0; not together with `layer`.
            size: (height, width) to which it is enlarged.

        Raises:
            ValueError: a word, layer or level that there is not; or both layer and level.
        """
        if word.lower() not in self.words:
            raise unknown("word", word, self.words)
        if layer is not None and level is not None:
            raise ValueError(f"Both layer={layer!r} and level={level} were given. Give one of them.")
        if layer is not None and layer not in self.layers:
            raise unknown("layer", layer, self.layers)
        if level is not None and not 0 <= level < len(self.levels):
            raise ValueError(f"There is no level {level}: {len(self.levels)} were recorded, from 0.")
        maps = self.layers[layer] if layer is not None else self.mean if level is None else self.levels[level][1]
        found = maps[self.words.index(word.lower())]
        return found if size is None else _enlarged(found[None, None], size)[0, 0]


class HeatMaps(Sequence[ImageMaps]):
    """The maps of a run's images, filled while it is recorded: `maps[i]` are those of image i."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []
        self._layers: dict[str, _Mean] = {}
        self._levels: dict[int, _Mean] = {}
        self._times: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, image: Any) -> Any:
        if not isinstance(image, int):
            raise TypeError(f"{image!r} is not the number of an image.")
        words = self.words[image]
        count = len(words)
        levels = [(self._times[index], self._levels[index].value[image, :count]) for index in sorted(self._levels)]
        return ImageMaps(
            words=tuple(words),
            mean=torch.stack([maps for _, maps in levels]).mean(0),
            layers={name: mean.value[image, :count] for name, mean in self._layers.items()},
            levels=levels,
        )

    def add(self, attention: Attention, maps: Tensor) -> None:
        """Count maps (B, W, h, w) of a layer at a level in."""
        self._times[attention.level.index] = float(torch.as_tensor(attention.level.t).flatten()[0])
        self._layers.setdefault(attention.name, _Mean()).add(maps)
        self._levels.setdefault(attention.level.index, _Mean()).add(_enlarged(maps, attention.finest))


@contextmanager
def record(pipe: Any, words: Sequence[str] | None = None) -> Iterator[HeatMaps]:
    """Within the block, sampling records where each image looks at each word of its prompt.

    One run at a time: its images are the rows of the maps. Everything is evaluated as before, to the same bits.

    Args:
        pipe: a `GuidedPipeline` or a denoiser of a text-to-image model (Stable Diffusion, SDXL, SD3, Flux, PixArt). A diffusers
            pipeline is recorded through `GuidedPipeline.from_pipe(pipe)`.
        words: the words, case ignored; all that a prompt has by default.

    Raises:
        ValueError: on entry, something without text. From within a run, a word that a prompt does not have or that was cut off,
            prompts that were given as embeddings, or other prompts than before in the block.

    Example:
        >>> with record(pipe, ["red", "seven"]) as maps:
        ...     images = pipe("a red seven on a yellow background", seeds=[0, 1]).images
        >>> maps[0].of("seven", size=(32, 32))
    """
    maps = HeatMaps()
    denoiser = text_denoiser(pipe)
    with watching(denoiser, _Recorder(denoiser, words, maps).observe):
        yield maps


def text_denoiser(pipe: Any) -> TextDenoiser:
    """The denoiser of a text-to-image model whose words are known by their tokens.

    Raises:
        ValueError: something else.
    """
    denoiser = pipe if isinstance(pipe, Denoiser) else getattr(pipe, "denoiser", None)
    if isinstance(denoiser, TextDenoiser) and denoiser.tokenizers:
        return denoiser
    name = denoiser.family if isinstance(denoiser, Denoiser) else type(pipe).__name__
    raise ValueError(f"Attention to words needs a GuidedPipeline of Stable Diffusion, SDXL, SD3, Flux or PixArt, not {name}.")


class _Recorder:
    """Makes maps of the attention that it observes."""

    def __init__(self, denoiser: TextDenoiser, words: Sequence[str] | None, maps: HeatMaps) -> None:
        self.denoiser, self.words, self.maps = denoiser, words, maps
        self.cond: Cond | None = None
        self.columns = torch.empty(0)

    def observe(self, attention: Attention) -> None:
        if attention.text is None or attention.grid is None:
            return
        with torch.no_grad():
            if attention.cond is not self.cond:
                self.cond, self.columns = attention.cond, self._columns(attention.cond)
            behind = attention.k.shape[2] - attention.text - self.columns.shape[1]
            values = F.pad(self.columns, (0, 0, attention.text, behind)).to(attention.k)
            shares = row_statistic(attention.q, attention.k, values, mask=attention.mask, scale=attention.scale).mean(1)
            self.maps.add(attention, shares.transpose(1, 2).unflatten(2, attention.grid))

    def _columns(self, cond: Cond) -> Tensor:
        """1 where a token of the text (rows) is of a word (columns), for each image: (B, S, W)."""
        prompts = self.denoiser.prompts_of(cond)
        words = [chosen_words(prompt, self.words) for prompt in prompts]
        if self.maps.words and self.maps.words != words:
            raise ValueError("The prompts changed while heat maps were recorded. Record each run in a block of its own.")
        self.maps.words = words
        count = cond.tensors[self.denoiser.inputs[0]].shape[1]
        columns = torch.zeros(len(prompts), count, max(1, *map(len, words)))
        for i, prompt in enumerate(prompts):
            positions = word_positions(self.denoiser, prompt, count)
            for j, word in enumerate(words[i]):
                if not positions[word]:
                    raise ValueError(f"The word {word!r} is beyond the {count} tokens that the model reads of {prompt!r:.100}.")
                columns[i, positions[word], j] = 1
        return columns


class _Mean:
    """A running mean of tensors, where they are: a copy to the CPU would let a GPU wait at each layer."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.total = value.float() if self.total is None else self.total + value.float()
        self.count += 1

    @property
    def value(self) -> Tensor:
        """On the CPU."""
        assert self.total is not None
        return self.total.cpu() / self.count


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, W, h, w) at another size, bilinear."""
    return F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
