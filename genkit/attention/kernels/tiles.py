"""How large a block of each kernel is: rows and keys a program, warps, pipeline stages. Data, chosen by the resource lock.

A row of the table serves all head dimensions up to its own, padded to a power of two, and operands of 2 or 4 bytes. Every row is
compiled for its architecture by `genkit attention lock`, which demands that no register spills and that shared memory suffices;
which of the rows that fit is the fastest is not known, since no GPU has run them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Shared memory that a program may use, in bytes (CUDA programming guide, technical specifications per compute capability; 1 KiB a
# block is reserved).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ARCHITECTURES = (80, 90, 100, 120)

# By bytes of an element. Float32 is multiplied as three products of TF32 parts: wider ones take more registers than a thread has,
# whatever the tile.
HEAD_DIM_MAX = {2: 256, 4: 64}


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A program's share of the work. `block_l` rows of queries, `block_s` keys; both at least 16, powers of two."""

    block_l: int
    block_s: int
    warps: int = 4
    stages: int = 2


def architecture(capability: int) -> int | None:
    """The entry of ARCHITECTURES whose rows serve a device of this compute capability (86 for 8.6); None if none does.

    Devices of compute capability 8.6 and 8.9 run the rows of 8.0, whose shared memory therefore stays within theirs.
    """
    return {8: 80, 9: 90, 10: 100, 11: 100, 12: 120}.get(capability // 10)


def padded(head_dim: int) -> int:
    """The power of two, at least 16, that a head dimension is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, capability: int, head_dim: int, itemsize: int) -> Tile:
    """The table's row for a kernel.

    Args:
        kernel: its name, as "probe_forward".
        capability: of the device, 90 for 9.0.
        head_dim: 1 to HEAD_DIM_MAX[itemsize].
        itemsize: bytes of an element, 2 or 4.

    Raises:
        ValueError: no row serves this compute capability.
    """
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    served = architecture(capability)
    if served is None:
        raise ValueError(f"No kernel serves compute capability {capability / 10:.1f}: 8.0 to 12.x are served.")
    return TABLE[kernel][itemsize, width, served]


TABLE = {
    k: {
        (b, w, a): Tile(block_l=64, block_s=16 if "map" in k or k == "probe_rows" else 32, warps=4, stages=2)
        for b, w in ((2, 64), (2, 128), (2, 256), (4, 64))
        for a in ARCHITECTURES
    }
    for k in ("probe_forward", "probe_map", "probe_rows", "probe_dq", "probe_dkv", "probe_dk_map", "tangent_forward")
}
