"""The resource lock: what each kernel takes on each architecture, committed, and what the compiler makes of the source today.

An entry is a kernel, an architecture and a configuration: "probe_forward/sm90/d64/fp16/mask". It must need no stack (registers
that spill to memory), no more shared memory than its architecture has, and use the matrix instructions of its architecture.
Without a GPU that is what can be known of speed.

Compiling is deterministic, so an entry carries a fingerprint of all that it was made from: source, tile, configuration. While
fingerprint and version of Triton are those of the lock, compiling again must give the same figures; another version of Triton may
give others, and then only the limits are demanded.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from genkit.attention.kernels.aot import ITEMSIZE, Resources, compile_kernel, helpers, kernels
from genkit.attention.kernels.tiles import ARCHITECTURES, SHARED_MEMORY, TENSOR_MEMORY, tile

PATH = Path(__file__).with_name("lock.json")

# The rows of 8.0 serve 8.6 and 8.9 too, which have less shared memory.
LIMITS = {architecture: SHARED_MEMORY[86 if architecture == 80 else architecture] for architecture in ARCHITECTURES}
FAMILIES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}

# Head dimensions: 40, 80 and 160 are those of Stable Diffusion 1, 72 of PixArt and DiT, 64 and 128 of most others. A masked
# kernel needs more than one without.
_NARROW = {40: "fp16/mask", 64: "fp16 fp16/mask bf16/mask fp32 fp32/mask", 80: "fp16/mask", 128: "fp16 fp16/mask bf16/mask"}
_WIDE = {**_NARROW, 160: "fp16/mask", 256: "fp16 fp16/mask"}
_SMALL = {64: "fp16/mask fp32/mask", 128: "fp16/mask", 256: "fp16/mask"}
CONFIGURATIONS = {
    **dict.fromkeys(("probe_forward", "probe_dq", "probe_dkv"), _WIDE),
    "tangent_forward": {72: "fp16/mask", **_NARROW},
    **dict.fromkeys(("probe_map", "probe_rows", "probe_dk_map"), _SMALL),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is locked: one kernel, architecture and configuration."""

    kernel: str
    architecture: int
    head_dim: int
    dtype: str
    masked: bool

    @property
    def name(self) -> str:
        """As the lock has it: "probe_forward/sm90/d64/fp16/mask"."""
        return f"{self.kernel}/sm{self.architecture}/d{self.head_dim}/{self.dtype}{'/mask' if self.masked else ''}"

    def fingerprint(self) -> str:
        """Of the source and of the tile."""
        sources = [inspect.getsource(kernel.fn) for kernel in (kernels()[self.kernel], *helpers())]
        chosen = asdict(tile(self.kernel, self.architecture, self.head_dim, ITEMSIZE[self.dtype]))
        return hashlib.sha256(json.dumps([self.name, chosen, sources], sort_keys=True).encode()).hexdigest()[:16]

    def compile(self) -> Resources:
        """What it takes today; 1 to 5 seconds."""
        return compile_kernel(self.kernel, self.architecture, self.head_dim, self.dtype, masked=self.masked)

    def problems(self, resources: Resources) -> list[str]:
        """Why these resources are not allowed."""
        limit, family = LIMITS[self.architecture], FAMILIES[self.architecture]
        problems = [f"{resources.stack} bytes of stack: registers spill"] if resources.stack else []
        if resources.shared > limit:
            problems.append(f"{resources.shared:,} bytes of shared memory, of which sm_{self.architecture} has {limit:,}")
        if resources.tensor > TENSOR_MEMORY:
            problems.append(f"{resources.tensor} columns of tensor memory, of which there are {TENSOR_MEMORY}")
        # Blocks of 16 or 32 rows are too small for wgmma and tcgen05, and float32 in three parts has no such instruction.
        exempt = self.dtype == "fp32" or CONFIGURATIONS[self.kernel] is _SMALL
        if family not in resources.mma and not (exempt and "mma.sync" in resources.mma):
            problems.append(f"matrix instructions {resources.mma or 'none'}, not {family}")
        return [f"{self.name}: {problem}" for problem in problems]


def entries() -> list[Entry]:
    """Everything that is locked, in order."""
    return [
        Entry(kernel=kernel, architecture=architecture, head_dim=head_dim, dtype=text[:4], masked=text.endswith("/mask"))
        for kernel, configurations in CONFIGURATIONS.items()
        for architecture in ARCHITECTURES
        for head_dim, texts in configurations.items()
        for text in texts.split()
    ]


def sample() -> list[Entry]:
    """One entry for each kernel and architecture: head dimension 64, float16, masked."""
    return [entry for entry in entries() if (entry.head_dim, entry.dtype, entry.masked) == (64, "fp16", True)]


def read(path: Path = PATH) -> dict[str, Any]:
    """The committed lock: "triton", its version, and "entries" by name.

    Raises:
        ValueError: no lock there.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{path} is not a resource lock. Make it with: genkit attention lock") from None


def write(document: Mapping[str, Any], path: Path = PATH) -> None:
    """One line for each entry, so that a change is a line's."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in document["entries"].items())
    path.write_text(f'{{\n  "triton": {json.dumps(document["triton"])},\n  "entries": {{\n{lines}\n  }}\n}}\n')


def measure(wanted: Iterable[Entry], jobs: int = 1) -> Iterator[tuple[Entry, Resources]]:
    """Compile entries, in order, in `jobs` processes."""
    wanted = list(wanted)
    if jobs == 1:
        yield from ((entry, entry.compile()) for entry in wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(Entry.compile, wanted), strict=True)


def rows(measured: Mapping[Entry, Resources]) -> dict[str, Any]:
    """The lock's entries of these figures."""
    found = {}
    for entry, resources in measured.items():
        chosen = asdict(tile(entry.kernel, entry.architecture, entry.head_dim, ITEMSIZE[entry.dtype]))
        found[entry.name] = {**asdict(resources), "tile": list(chosen.values()), "fingerprint": entry.fingerprint()}
    return found


def stale(lock: Mapping[str, Any]) -> list[str]:
    """Names of entries that the lock lacks, has too many, or has of other source or tiles."""
    now = {entry.name: entry.fingerprint() for entry in entries()}
    then = {name: row["fingerprint"] for name, row in lock["entries"].items()}
    return [name for name in dict.fromkeys((*now, *then)) if now.get(name) != then.get(name)]


def problems(measured: Mapping[Entry, Resources]) -> list[str]:
    """Limits that entries break."""
    return [problem for entry, resources in measured.items() for problem in entry.problems(resources)]


def compare(lock: Mapping[str, Any], measured: Mapping[Entry, Resources], triton_version: str) -> list[str]:
    """What is wrong: limits that an entry breaks, and, under the lock's own version of Triton, figures that are not those of the
    lock."""
    found = problems(measured)
    for entry, resources in measured.items():
        row = lock["entries"].get(entry.name)
        if row is not None and lock["triton"] == triton_version:
            changed = {key: (row[key], value) for key, value in asdict(resources).items() if row[key] != value}
            found += [f"{entry.name}: {key} was {before}, is {now}" for key, (before, now) in changed.items()]
    return found
