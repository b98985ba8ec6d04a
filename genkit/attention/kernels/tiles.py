"""How large a block of each kernel is: rows and keys a program, warps, pipeline stages. Data, chosen by the resource lock.

A row of the table serves all head dimensions up to its own, padded to a power of two, and operands of 2 or 4 bytes. Every row is
compiled for its architecture by `genkit attention lock`, which demands that no register spills and that shared memory suffices;
which of the rows that fit is the fastest is not known, since no GPU has run them.
"""

from __future__ import annotations

from dataclasses import dataclass

# Shared memory that a program may use, in bytes: what the CUDA programming guide has for each compute capability, less 1 KiB that
# is reserved. Tensor memory, of 10.0 only, in columns.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_MEMORY = 512
ARCHITECTURES = (80, 90, 100, 120)

# By operator, and by bytes of an element. Float32 is multiplied as three products of TF32 parts, and forward mode has twice the
# operands: wider ones take more registers than a thread has, whatever the tile.
HEAD_DIM_MAX = {"attend_probe": {2: 256, 4: 64}, "attend_jvp": {2: 128, 4: 64}}


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
        head_dim: 1 to that of HEAD_DIM_MAX.
        itemsize: bytes of an element, 2 or 4.

    Raises:
        ValueError: no row serves this compute capability.
    """
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    served = architecture(capability)
    if served is None:
        raise ValueError(f"No kernel serves compute capability {capability / 10:.1f}: 8.0 to 12.x are served.")
    return TABLE[kernel][itemsize, width, served]


def _table(rows: dict[tuple[int, int], list[tuple[int, int, int, int]]]) -> dict[tuple[int, int, int], Tile]:
    """Tiles by (bytes, head dimension, architecture), from (block_l, block_s, warps, stages) of each architecture in order."""
    return {
        (itemsize, width, served): Tile(block_l=block_l, block_s=block_s, warps=warps, stages=stages)
        for (itemsize, width), row in rows.items()
        for served, (block_l, block_s, warps, stages) in zip(ARCHITECTURES, row, strict=True)
    }


_SMALL = _table({(itemsize, width): [(32, 16, 4, 2)] * 4 for itemsize, width in ((2, 64), (2, 128), (2, 256), (4, 64))})

TABLE = {
    "probe_forward": _table(
        {
            (2, 64): [(128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)],
            (2, 128): [(128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
            (2, 256): [(64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)],
            (4, 64): [(32, 32, 4, 2), (64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)],
        }
    ),
    "probe_dq": _table(
        {
            (2, 64): [(128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)],
            (2, 128): [(64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)],
            (2, 256): [(64, 32, 8, 1), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
            (4, 64): [(32, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 4, 1)],
        }
    ),
    "probe_dkv": _table(
        {
            (2, 64): [(32, 64, 4, 1), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 4, 1)],
            (2, 128): [(32, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (16, 64, 4, 1)],
            (2, 256): [(32, 32, 8, 1), (16, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
            (4, 64): [(32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)],
        }
    ),
    "tangent_forward": _table(
        {
            (2, 64): [(64, 32, 4, 1), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 1)],
            (2, 128): [(32, 32, 4, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)],
            (4, 64): [(16, 16, 4, 1), (64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 4, 1)],
        }
    ),
    "probe_map": _SMALL,
    "probe_rows": _SMALL,
    "probe_dk_map": _SMALL,
}
