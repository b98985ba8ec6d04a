"""Attend-and-Excite (Chefer et al. 2023, arXiv 2301.13826): no word of the prompt may be overlooked.

    A_w(i)     share of place i's attention that word w gets: softmax over the prompt's tokens of 100 p_ij, where p is attention to
               the text, averaged over heads and over the layers of one grid; then smoothed
    L          = max over the words of  1 - max_i A_w(i)                          (their eq. 2: the most neglected word)
    x'         = x - scale sqrt(1 - t/2) grad_x L,      t the progress from 0 to 1    (before the denoiser, in the first half)

At some levels x' is taken again and again until each word's largest share reaches a target ("iterative latent refinement").

x above is in the variance-preserving variable; in a scheduler's own, of norm n = sqrt(alpha^2 + sigma^2), the displacement is n^2
times the gradient there. The authors' softmax includes CLIP's padding; here the prompt's tokens and the end token compete, as in
their code for Stable Diffusion 2, so that texts of any length mean the same. The maps are row statistics: attention stays fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.attention.heatmaps import text_denoiser
from genkit.attention.statistics import row_statistic
from genkit.attention.watching import Attention, watching
from genkit.denoisers.text import TextDenoiser
from genkit.denoisers.words import chosen_words, prompt_positions, word_positions
from genkit.guidance.base import Guidance, State
from genkit.levels import broadcast

Words = Sequence[str] | Callable[[str], Sequence[str]]
SHARPNESS = 100.0  # of the softmax over tokens, in the authors' code
TARGETS = ((0.0, 0.05), (0.2, 0.5), (0.4, 0.8))
_KERNEL = (0.10650698, 0.78698604, 0.10650698)  # Gaussian of standard deviation 0.5, 3 taps


class AttendAndExcite(Guidance):
    """Move the sample, before each evaluation, to where every one of some words gets attention somewhere.

    Each displacement costs a forward and a backward pass of the network with the condition alone.

    Args:
        words: what must not be overlooked, case ignored: words that every prompt has, or a function from a prompt to those of it.
        scale: length of the displacements; 20 in the paper, for Stable Diffusion. 0 is off.
        grid: side of the attention maps; by default that nearest to a quarter of the latents' side (16 of 64 in the paper).
        until: fraction of the run after which nothing is displaced.
        targets: (progress, largest share that each word must reach there): refined at the first evaluation that is so far.
        refinements: how many displacements a refinement may take.

    Raises:
        ValueError: no words, or a value out of its range. From within a run: a word that a prompt does not have, prompts given as
            embeddings, a grid that the network does not have, or a run that is not of `GuidedPipeline`.

    Example:
        >>> pipe("a cat and a frog", guidance=AttendAndExcite(["cat", "frog"]))
    """

    name = "attend"

    def __init__(
        self,
        words: Words,
        scale: float = 20.0,
        *,
        grid: int | None = None,
        until: float = 0.5,
        targets: Sequence[tuple[float, float]] = TARGETS,
        refinements: int = 20,
    ) -> None:
        words = [words] if isinstance(words, str) else words
        if not callable(words) and not (words and all(isinstance(word, str) and word.strip() for word in words)):
            raise ValueError(f"words={words!r:.100} must be words of the prompt, for instance ['cat', 'frog'].")
        if not math.isfinite(scale) or scale < 0:
            raise ValueError(f"scale={scale} must be finite and at least 0.")
        if grid is not None and grid < 1:
            raise ValueError(f"grid={grid} must be at least 1.")
        if not 0 <= until <= 1:
            raise ValueError(f"until={until} must be from 0 to 1.")
        if any(not (0 <= place <= 1 and 0 < share < 1) for place, share in targets):
            raise ValueError(f"targets={targets!r:.100} must be pairs of a progress from 0 to 1 and a share between 0 and 1.")
        if refinements < 0:
            raise ValueError(f"refinements={refinements} must be at least 0.")
        self.words, self.scale, self.grid, self.until = words, float(scale), grid, until
        self.targets, self.refinements = sorted(targets), refinements

    def check(self, pipe: Any) -> None:
        from genkit.denoisers import Denoiser

        text_denoiser(Denoiser.of(pipe))

    def active(self, state: State) -> bool:
        return self.scale > 0 and state.progress <= self.until and state.level.order == 1

    def before(self, state: State) -> Tensor:
        if not self.active(state):
            return state.x
        reader = state.cache.get(self)
        if reader is None:
            if state.denoiser is None:
                raise ValueError("Attend-and-Excite evaluates the network itself. Use it with GuidedPipeline.")
            reader = state.cache[self] = AttentionReader(text_denoiser(state.denoiser), state.cond, self.words, self.grid)
        x = state.x.detach()
        size = broadcast(self._size(state), x)
        target = self._target(state)
        shares, gradient = reader(x, state)
        for _ in range(self.refinements if target is not None else 0):
            assert target is not None
            short = shares.amin(1) < target
            if not short.any():
                break
            x = torch.where(short.view(-1, *[1] * (x.ndim - 1)), x - size * gradient, x)
            shares, gradient = reader(x, state)
        state.log[self.name] = state.energy[self.name] = shares.amin(1)
        return x - size * gradient

    def _size(self, state: State) -> float | Tensor:
        """scale sqrt(1 - t/2), in the scheduler's own variable."""
        return self.scale * math.sqrt(1 - state.progress / 2) * state.level.norm**2

    def _target(self, state: State) -> float | None:
        """The share to be reached at this evaluation, if it is the first one that is so far."""
        index, last = state.level.index, max(1, len(state.levels) - 1)
        due = [share for place, share in self.targets if index == math.ceil(place * last)]
        return due[-1] if due else None


class AttentionReader:
    """Largest shares of attention of some words at a sample, and the gradient of the loss.

    Args:
        denoiser, cond: what is evaluated, and the condition of B samples, made from prompts.
        words: as of `AttendAndExcite`.
        grid: side of the maps, or None for the paper's quarter of the latents' side.
    """

    def __init__(self, denoiser: TextDenoiser, cond: Any, words: Words, grid: int | None = None) -> None:
        self.denoiser, self.cond, self.grid = denoiser, cond, grid
        count = cond.tensors[denoiser.inputs[0]].shape[1]
        prompts = denoiser.prompts_of(cond)
        chosen = [chosen_words(prompt, words(prompt) if callable(words) else words) for prompt in prompts]
        tokens = [prompt_positions(denoiser, prompt, count) for prompt in prompts]
        self.tokens = torch.zeros(len(prompts), count, max(map(len, tokens)))  # which token each column is
        self.open = torch.zeros(len(prompts), self.tokens.shape[2], dtype=torch.bool)
        self.of_word = torch.zeros(len(prompts), self.tokens.shape[2], max(map(len, chosen)))  # which word
        self.missing = torch.ones(len(prompts), self.of_word.shape[2], dtype=torch.bool)  # a prompt of fewer words than another
        for i, prompt in enumerate(prompts):
            positions = word_positions(denoiser, prompt, count)
            self.tokens[i, tokens[i], range(len(tokens[i]))] = 1
            self.open[i, : len(tokens[i])] = True
            self.missing[i, : len(chosen[i])] = False
            for j, word in enumerate(chosen[i]):
                if not positions[word]:
                    raise ValueError(f"The word {word!r} is beyond the {count} tokens that the model reads of {prompt!r:.100}.")
                self.of_word[i, [tokens[i].index(position) for position in positions[word]], j] = 1

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """(largest share (B, W) of each word, gradient (B, ...) of L) at a sample x (B, ...)."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_(True)
            shares = self.shares(leaf, state)
            loss = (1 - shares).amax(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return shares.detach(), gradient.to(x.dtype)

    def shares(self, x: Tensor, state: State) -> Tensor:
        """(B, W), differentiable."""
        seen: list[Attention] = []
        with watching(self.denoiser, lambda attention: seen.append(attention) if attention.text is not None else None):
            self.denoiser(x, state.level, self.cond)
        chosen = self._chosen(seen)
        p_BLJ = torch.stack([self._map(attention) for attention in chosen]).mean(0)
        share_BLJ = (SHARPNESS * p_BLJ).masked_fill(~self.open[:, None].to(x.device), float("-inf")).softmax(-1)
        maps = (share_BLJ @ self.of_word.to(share_BLJ)).transpose(1, 2).unflatten(2, chosen[0].grid)
        return smoothed(maps).amax((2, 3)).masked_fill(self.missing.to(x.device), 1.0)

    def _chosen(self, seen: list[Attention]) -> list[Attention]:
        """The attention of one grid."""
        grids = {attention.grid: attention for attention in seen if attention.grid is not None}
        if not grids:
            raise ValueError(f"{self.denoiser.family} has no attention from places of the image to the text.")
        if self.grid is None:
            aim = max(seen[0].finest) * self.denoiser._size_multiple() / 4
            best = min(grids, key=lambda grid: abs(math.log(max(grid) / aim)))
        else:
            fitting = [grid for grid in grids if max(grid) == self.grid]
            if not fitting:
                sides = ", ".join(str(max(known)) for known in grids)
                raise ValueError(f"The network reads the text on no grid of side {self.grid}. It has {sides}.")
            best = fitting[0]
        return [attention for attention in seen if attention.grid == best]

    def _map(self, attention: Attention) -> Tensor:
        """p (B, L, J) of the prompt's tokens, averaged over heads."""
        assert attention.text is not None
        behind = attention.k.shape[2] - attention.text - self.tokens.shape[1]
        columns = F.pad(self.tokens, (0, 0, attention.text, behind)).to(attention.k)
        return row_statistic(attention.q, attention.k, columns, mask=attention.mask, scale=attention.scale).mean(1).float()


def smoothed(maps: Tensor) -> Tensor:
    """Maps (B, W, h, w) under a 3 x 3 Gaussian of standard deviation 0.5; their edges are mirrored."""
    count = maps.shape[1]
    kernel = torch.tensor(_KERNEL, dtype=maps.dtype, device=maps.device)
    both = torch.outer(kernel, kernel).expand(count, 1, 3, 3)
    mode = "reflect" if min(maps.shape[2:]) > 1 else "replicate"
    return F.conv2d(F.pad(maps, (1, 1, 1, 1), mode=mode), both, groups=count)
