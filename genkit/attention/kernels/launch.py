"""From tensors to Triton: strides, tiles, grids."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.attention.kernels.serving import interpreted
from genkit.attention.kernels.tiles import Tile, padded, tile

ALIGN = 8  # elements: 16 bytes in half precision


def contiguous_rows(x: Tensor) -> Tensor:
    """With a last dimension that is contiguous, which the kernels rely on."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(mask: Tensor) -> Tensor:
    """With strides that are multiples of 8, and as many columns: a copy with padded rows, unless it is so already."""
    for dimension in range(3):
        if mask.stride(dimension) == 0:  # expanded, and will be again
            mask = mask.narrow(dimension, 0, 1)
    if mask.shape[-1] % ALIGN == 0 and mask.stride(-1) == 1 and all(stride % ALIGN == 0 for stride in mask.stride()[:3]):
        return mask
    return F.pad(mask, (0, -mask.shape[-1] % ALIGN)).contiguous()


class Launch:
    """What the kernels of one call share.

    Args:
        q, k: (B, H, L, D) and (B, H, S, D), checked.
        mask: (B|1, H|1, L|1, S), added to the logits.
        keys: (J,) or (B, J), of whole numbers.
        scale: of the logits.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, keys: Tensor | None = None) -> None:
        self.q, self.scale = q, scale
        (self.B, self.H, self.L, self.D), self.S = q.shape, k.shape[2]
        self.masked = mask is not None
        self.mask = q  # a kernel without a mask does not read it
        if mask is not None:
            self.mask = _aligned(mask).expand(self.B, self.H, self.L, -1)
        keys = torch.empty(0, device=q.device) if keys is None else keys
        self.keys = keys.to(q.device, torch.int32).contiguous()
        self.J = self.keys.shape[-1]

    def matrix(self, length: int) -> Tensor:
        """Memory for (B, H, length, D), laid out as (B, length, H, D): what the host does next is to join the heads."""
        return self.q.new_empty(self.B, length, self.H, self.D).transpose(1, 2)

    def statistic(self) -> Tensor:
        """Memory for one number a row: (B, H, L), float32."""
        return self.q.new_empty(self.B, self.H, self.L, dtype=torch.float32)

    def run(
        self, kernel: Any, over: str, pointers: list[Tensor], matrices: list[Tensor], *, keyed: bool = False, chunk: int = 0
    ) -> None:
        """Run a kernel.

        Args:
            over: what its programs share out: "rows" or "keys" of each head, "map" (rows and selected keys of each image), or
                "chunks" of each head's rows for selected keys.
            pointers: its tensors, in order.
            matrices: those whose strides follow, in order: (B, H, length, D) each.
            keyed: whether it takes the selected keys.
            chunk: rows a program, of "chunks".
        """
        chosen = self._tile(kernel)
        heads, row_blocks, key_blocks = self.B * self.H, _blocks(self.L, chosen.block_l), _blocks(self.J, chosen.block_s)
        grids: dict[str, tuple[int, ...]] = {
            "rows": (heads * row_blocks,),
            "keys": (heads * _blocks(self.S, chosen.block_s),),
            "map": (self.B * row_blocks, key_blocks),
            "chunks": (heads * _blocks(self.L, chunk or self.L), key_blocks),
        }
        strides, align = _strides([*matrices, *([self.mask] if self.masked else [])])
        if not self.masked:
            strides += [0, 0, 0]
        sizes = [self.J if self.keys.ndim == 2 else 0] if keyed else []
        sizes += [self.H, self.L, self.S, *([self.J] if keyed else []), *([chunk] if chunk else [])]
        upcast = interpreted() and self.q.dtype == torch.bfloat16
        with torch.cuda.device(self.q.device) if self.q.is_cuda else nullcontext():
            kernel[grids[over]](
                *pointers,
                *strides,
                *sizes,
                self.scale,
                **constants(self.D, chosen, align=align, masked=self.masked, upcast=upcast),
                num_warps=chosen.warps,
                num_stages=chosen.stages,
            )

    def _tile(self, kernel: Any) -> Tile:
        """The interpreter runs the tiles of compute capability 8.0."""
        major, minor = (8, 0) if interpreted() else torch.cuda.get_device_capability(self.q.device)
        return tile(kernel.__name__, 10 * major + minor, self.D, self.q.element_size())


def constants(head_dim: int, chosen: Tile, *, align: int, masked: bool, upcast: bool) -> dict[str, Any]:
    """The compile-time arguments of every kernel."""
    blocks = {"D": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_L": chosen.block_l, "BLOCK_S": chosen.block_s}
    return {**blocks, "ALIGN": align, "HAS_MASK": masked, "UPCAST": upcast}


def _strides(matrices: list[Tensor]) -> tuple[list[int], int]:
    """Strides but the last, and the number that they are counted in.

    Raises:
        ValueError: a head is too large for 32 bits.
    """
    longest = max(x.shape[2] * x.stride(2) for x in matrices)
    if longest >= 2**31:
        raise ValueError(f"A head spans {longest:,} numbers in memory; the kernels count to 2^31. Call .contiguous() on it.")
    strides = [stride if size > 1 else 0 for x in matrices for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    align = ALIGN if all(stride % ALIGN == 0 for stride in strides) else 1
    return [stride // align for stride in strides], align


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
