"""Masks of inpainting, and what a student is told with one: behind its sample x_u the mask m, and the rest of the picture.

    [x_u, m, E(p (1 - M))]          m (B, 1, h, w), 1 where to paint; M the same in pixels; p the picture in [-1, 1]; E the encoder

That is the input of Stable Diffusion's inpainting networks (Rombach et al. 2022, arXiv 2112.10752), so a student is sampled by the
inpainting pipelines of diffusers. LADD's recipe is that of generation, with random masks (Sauer et al. 2024, arXiv 2403.12015).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit import noise as noises
from genkit.denoisers import Cond, Denoiser


@torch.no_grad()
def masked(cond: Cond, x0: Tensor, mask: Tensor, denoiser: Denoiser) -> Cond:
    """The condition of an inpainting student for clean samples x0 (B, c, h, w), with "concat" (B, 1 + c, h, w)."""
    pictures = denoiser.decode(x0).clamp(-1, 1)
    kept = 1 - F.interpolate(mask, size=pictures.shape[-2:])
    return cond.with_concat(torch.cat([mask, denoiser.encode(kept * pictures)], dim=1))


def random_masks(items: Sequence[int], step: int, seed: int, size: Sequence[int]) -> Tensor:
    """Masks (B, 1, h, w) of the latents' size (h, w), 1 where to paint: rectangles, a function of (item, step, seed).

    Their sides are a quarter to the full length of the sample's, a third of them the full one, and a third of the others begin or
    end at the border. So there are holes, bands and halves, and about one in nine is everything.
    """
    masks = torch.zeros(len(items), 1, *size)
    for mask, item in zip(masks, items, strict=True):
        generator = torch.Generator().manual_seed(noises.mix((seed << 32) + step, noises.TRAINING + 60) ^ item)
        lengths, places = torch.rand(2, 2, generator=generator).tolist()
        sides = [max(1, round(min(0.25 + 1.125 * a, 1.0) * full)) for a, full in zip(lengths, size, strict=True)]
        rooms = [full - side for side, full in zip(sides, size, strict=True)]
        y, x = (round(min(max(1.5 * a - 0.25, 0.0), 1.0) * room) for a, room in zip(places, rooms, strict=True))
        mask[:, y : y + sides[0], x : x + sides[1]] = 1
    return masks


def lower_half(count: int, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Masks (B, 1, h, w) of size (h, w), 1 in the lower half."""
    mask = torch.zeros(count, 1, *size, device=device)
    mask[..., size[0] // 2 :, :] = 1
    return mask
