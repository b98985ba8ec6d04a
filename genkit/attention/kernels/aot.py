"""Kernels compiled ahead of time, for GPUs that are not here: registers, stack, shared memory, and which matrix instructions.

Triton compiles to machine code without a driver; `cuobjdump`, which its wheel brings, tells registers and stack (stack means that
registers were spilled to memory). The compiler does not compare shared memory with what the device has, so that is done here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from genkit.attention.kernels.launch import ALIGN, constants
from genkit.attention.kernels.tiles import Tile, tile

ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
OPERANDS = {"Q", "K", "V", "Out", "Mask", "dO", "dQ", "dK", "dV", "tQ", "tK", "tV", "tO"}
STATISTICS = {"Lse", "Entropy", "Map", "dLse", "dEntropy", "dMap", "C", "Part"}  # float32 whatever the operands are
MMA = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma.sync": "mma.sync"}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel takes.

    Args:
        registers: a thread.
        stack: bytes a thread: registers that were spilled.
        shared: bytes of shared memory a program.
        tensor: columns of tensor memory a program, of 10.0.
        mma: families of matrix instructions in its code, joined by "+".
    """

    registers: int
    stack: int
    shared: int
    tensor: int
    mma: str


@cache
def kernels() -> dict[str, Any]:
    """Every kernel by its name; imports Triton.

    Raises:
        ImportError: Triton is not installed, or interprets.
    """
    try:
        import triton
    except ImportError:
        raise ImportError("The kernels need Triton, which is not installed (pip install triton).") from None
    from genkit.attention.kernels import probe, probe_backward, tangent

    found = [probe.probe_forward, probe.probe_map, probe_backward.probe_rows, probe_backward.probe_dq, probe_backward.probe_dkv]
    found += [probe_backward.probe_dk_map, tangent.tangent_forward]
    if not all(isinstance(kernel, triton.JITFunction) for kernel in found):
        raise ImportError("Triton interprets kernels (TRITON_INTERPRET=1), so it compiles none: unset the variable.")
    return {kernel.__name__: kernel for kernel in found}


def helpers() -> list[Any]:
    """What the kernels call."""
    from genkit.attention.kernels import blocks

    return [blocks.load_rows, blocks.store_rows, blocks.logits, blocks.load_lse2, blocks.load_keys]


def compile_kernel(
    name: str, architecture: int, head_dim: int, dtype: str, *, masked: bool, chosen: Tile | None = None
) -> Resources:
    """Compile a kernel as `Launch` would run it on tensors whose strides are multiples of 8.

    Args:
        name: as "probe_forward".
        architecture: 80, 90, 100 or 120.
        head_dim: 1 to 256.
        dtype: fp16, bf16 or fp32.
        masked: with an additive mask, of the same type.
        chosen: another tile than the table's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = kernels()[name]
    chosen = chosen or tile(name, architecture, head_dim, ITEMSIZE[dtype])
    fixed = constants(head_dim, chosen, align=ALIGN, masked=masked, upcast=False)
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        signature[argument] = _type(argument, dtype, fixed)
        if signature[argument].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = compile(
        ASTSource(kernel, signature, fixed, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": chosen.warps, "num_stages": chosen.stages},
    )
    ptx = compiled.asm["ptx"]
    registers, stack = _usage(compiled.asm["cubin"])
    mma = "+".join(family for family, instruction in MMA.items() if instruction in ptx)
    tensor = getattr(compiled.metadata, "tmem_size", 0) or 0
    return Resources(registers=registers, stack=stack, shared=compiled.metadata.shared, tensor=tensor, mma=mma)


def _type(argument: str, dtype: str, fixed: dict[str, Any]) -> str:
    """Triton's name of an argument's type."""
    if argument in fixed:
        return "constexpr"
    if argument == "scale":
        return "fp32"
    if argument == "Keys":
        return "*i32"
    if argument in STATISTICS:
        return "*fp32"
    return f"*{dtype}" if argument in OPERANDS else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack) of the one kernel in a binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump did not tell the resources: {text.strip()!r}")
    return int(found[1]), int(found[2])
