"""What attention costs: fused kernels, this project's own, and the dense matrix, at the shapes of well-known models.

    attention                out
    attention, gradient      out, and the gradients of q, k, v
    statistics               out, row entropy, map of 8 keys averaged over heads     (`attend_probe`)
    statistics, gradient     the same, and gradients of all three
    derivative               out, and its derivative in a direction                  (`attend_jvp`)

The ways of a task are timed in turn within each round, so that a change of the machine's speed hits all alike; medians. On a GPU a
timing is of as many calls, one after the other, as take a few milliseconds: what one costs in a network, where the next is queued
while it runs. FLOPs and bytes are those that any way must spend: 2 products of matrices forward, 5 backward, 6 for the derivative;
each input and output once. So a way that spends more shows fewer per second.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit import _host
from genkit.attention import kernels
from genkit.attention.backends import why_unusable
from genkit.attention.jvp import attend_jvp
from genkit.attention.jvp import by_algebra as jvp_by_algebra
from genkit.attention.probe import attend_probe, by_algebra
from genkit.measuring import added_bytes, seconds

KEYS = list(range(1, 9))
NOT_RUN = "not run on a GPU"
_LEAST = 4e-3  # seconds that a timing on a GPU takes: so many that starting and waiting do not count
_DOTS = {"attention": 2, "attention, gradient": 7, "statistics": 2, "statistics, gradient": 7, "derivative": 6}
_MOVED = {"attention": 2, "attention, gradient": 6, "statistics": 2, "statistics, gradient": 6, "derivative": 4}  # times (L + S) D


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """An attention layer of a model: H heads of width D, L queries, S keys; `image` of the queries (and keys) are of the image."""

    model: str
    layer: str
    H: int
    L: int
    S: int
    D: int
    image: int

    def smaller(self, side: int) -> Shape:
        """The same on an image of 1/side of the height and width; the text stays."""
        less = self.image - self.image // side**2
        keys = self.S if self.S < self.L else self.S - less
        return dataclasses.replace(self, L=self.L - less, S=keys, image=self.image - less)


SHAPES = {  # 512 x 512 pixels for Stable Diffusion 1.5, 1024 x 1024 for the others
    "sd15": [
        Shape(model="SD 1.5", layer="self, 64 x 64", H=8, L=4096, S=4096, D=40, image=4096),
        Shape(model="SD 1.5", layer="text, 64 x 64", H=8, L=4096, S=77, D=40, image=4096),
        Shape(model="SD 1.5", layer="self, 32 x 32", H=8, L=1024, S=1024, D=80, image=1024),
    ],
    "sdxl": [
        Shape(model="SDXL", layer="self, 64 x 64", H=10, L=4096, S=4096, D=64, image=4096),
        Shape(model="SDXL", layer="text, 64 x 64", H=10, L=4096, S=77, D=64, image=4096),
        Shape(model="SDXL", layer="self, 32 x 32", H=20, L=1024, S=1024, D=64, image=1024),
    ],
    "sd3": [Shape(model="SD3 medium", layer="joint, 64 x 64 + 333", H=24, L=4429, S=4429, D=64, image=4096)],
    "flux": [Shape(model="Flux.1", layer="joint, 64 x 64 + 512", H=24, L=4608, S=4608, D=128, image=4096)],
}


class Inputs:
    """Random q, k, v of a shape, and what each task does with them by each way."""

    def __init__(self, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [(batch, shape.H, length, shape.D) for length in (shape.L, shape.S, shape.S)]
        self.q, self.k, self.v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
        self.tangents = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
        self.scale = shape.D**-0.5

    def tasks(self, gradients: bool) -> Iterator[tuple[str, dict[str, Callable[[], Any] | str]]]:
        """(task, {way: what computes it, or why nothing does})."""
        attention = {"dense": self._dense} | self._fused()
        probes = {
            "dense": self._dense_statistics,
            "algebra": self._algebra,
            "kernel": kernels.unserved("attend_probe", self.q, self.v) or self._kernel_statistics,
        }
        for task, ways in (("attention", attention), ("statistics", probes)):
            yield task, {name: way if isinstance(way, str) else _called(way, self) for name, way in ways.items()}
            if gradients:
                yield (
                    f"{task}, gradient",
                    {name: way if isinstance(way, str) else _differentiated(way, self) for name, way in ways.items()},
                )
        derivative: dict[str, Any] = {
            "dense": self._dense_derivative,
            "algebra": self._derivative_by_algebra,
            "kernel": kernels.unserved("attend_jvp", self.q, self.v) or self._derivative,
        }
        yield "derivative", {name: way if isinstance(way, str) else _called(way, self) for name, way in derivative.items()}

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [torch.softmax(q @ k.transpose(-1, -2) * self.scale, -1) @ v]

    def _fused(self) -> dict[str, Any]:
        """The kernels of `scaled_dot_product_attention`, xformers and flex."""
        backends = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }
        ways: dict[str, Any] = {}
        for name, backend in backends.items():
            ways[name] = why_unusable(name, self.q.device) or self._by(backend)
        reason = why_unusable("xformers", self.q.device)
        ways["xformers"] = reason or _one(_host.attention_function("xformers"))
        ways["flex"] = _one(_compiled_flex()) if self.q.is_cuda else "compiled flex attention has no gradient on a CPU"
        return ways

    def _by(self, backend: SDPBackend) -> Callable[..., list[Tensor]]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            with sdpa_kernel(backend):
                return [F.scaled_dot_product_attention(q, k, v)]

        return attend

    def _dense_statistics(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        log_p = torch.log_softmax(q @ k.transpose(-1, -2) * self.scale, -1)
        p = log_p.exp()
        return [p @ v, -(p * log_p).sum(-1), p[..., KEYS].mean(1)]

    def _algebra(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        keys = torch.tensor(KEYS, device=q.device)
        probe = by_algebra(q, k, v, keys, None, self.scale, entropy=True, output=True)
        return [x for x in (probe.out, probe.entropy, probe.map) if x is not None]

    def _kernel_statistics(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        probe = attend_probe(q, k, v, KEYS)
        return [x for x in (probe.out, probe.entropy, probe.map) if x is not None]

    def _dense_derivative(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(lambda *x: self._dense(*x)[0], (q, k, v), tuple(self.tangents))

    def _derivative_by_algebra(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        tq, tk, tv = self.tangents
        return jvp_by_algebra(q, k, v, tq, tk, tv, None, self.scale)

    def _derivative(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attend_jvp(q, k, v, *self.tangents)


def run(
    shapes: Sequence[Shape],
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    rounds: int = 5,
    gradients: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure every task and way at every shape.

    Args:
        batch: samples.
        rounds: timings of each, of which the median counts.
        gradients: whether the tasks with gradients are measured too.
        progress: called after each task.

    Returns:
        A row for each: `model`, `layer`, `B`, `H`, `L`, `S`, `D`, `task`, `way`, and either `ms`, `tflops` and `gbs` (what must be
        spent, per second), `mb` (the most that is allocated at a time), and `dense_over_this`; or `reason`: why it was not run.
    """
    rows = []
    for shape in shapes:
        inputs = Inputs(shape, batch, dtype, torch.device(device))
        for task, ways in inputs.tasks(gradients):
            rows += _rows(shape, batch, inputs.q.element_size(), task, _measure(ways, rounds))
            progress()
    return rows


def count_tasks(shapes: Sequence[Shape], gradients: bool = True) -> int:
    """How often `run` calls `progress`."""
    return len(shapes) * (5 if gradients else 3)


def _measure(ways: dict[str, Any], rounds: int) -> dict[str, tuple[float, int] | str]:
    """(seconds, bytes) of each way, or why it was not run."""
    found: dict[str, Any] = {}
    for name, way in ways.items():
        if isinstance(way, str):
            found[name] = way
            continue
        try:
            way()  # compiles, and meets what cannot be done
            found[name] = added_bytes(way)
        except Exception as error:  # kernels refuse shapes in many ways, and memory may run out
            found[name] = " ".join(str(error).split())[:200]
    good = [name for name, value in found.items() if not isinstance(value, str)]
    calls = {name: _calls(ways[name]) for name in good}
    times: dict[str, list[float]] = {name: [] for name in good}
    for _ in range(rounds):
        for name in good:
            times[name].append(seconds(_repeated(ways[name], calls[name])) / calls[name])
    return {name: (statistics.median(times[name]), value) if name in times else value for name, value in found.items()}


def _calls(way: Callable[[], Any]) -> int:
    """How often a way is called in a timing."""
    return min(1000, max(1, round(_LEAST / seconds(way)))) if torch.cuda.is_available() else 1


def _repeated(way: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            way()

    return run


def _rows(shape: Shape, batch: int, size: int, task: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    heads = batch * shape.H
    flops = 2 * _DOTS[task] * heads * shape.L * shape.S * shape.D
    moved = _MOVED[task] * heads * (shape.L + shape.S) * shape.D * size
    where = {"model": shape.model, "layer": shape.layer, "B": batch, "H": shape.H, "L": shape.L, "S": shape.S, "D": shape.D}
    dense = measured["dense"]
    rows = []
    for way, value in measured.items():
        row = where | {"task": task, "way": way}
        if isinstance(value, str):
            rows.append(row | {"reason": value})
            continue
        time, most = value
        ratio = None if isinstance(dense, str) else dense[0] / time
        speed = {"ms": 1e3 * time, "tflops": flops / time / 1e12, "gbs": moved / time / 1e9}
        rows.append(row | speed | {"mb": most / 1e6, "dense_over_this": ratio})
    return rows


def machine(device: torch.device | str) -> dict[str, Any]:
    """What was measured on: device, versions, git hash; and whether a GPU had a part in it."""
    from importlib.metadata import PackageNotFoundError, version

    from genkit.recipe import versions

    on_gpu = torch.device(device).type == "cuda"
    found = versions()
    for package in ("triton", "xformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "gpu": "yes" if on_gpu else NOT_RUN, "git": _git_hash(), "versions": found}


def _git_hash() -> str | None:
    """The commit of the checkout that this file is in; None where it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _called(way: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return way(inputs.q, inputs.k, inputs.v)

    return call


def _differentiated(way: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    def call() -> Any:
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        return torch.autograd.grad(sum(x.float().square().mean() for x in way(*leaves)), leaves)

    return call


def _one(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda q, k, v: [function(q, k, v)]


def _compiled_flex() -> Callable[..., Tensor]:
    """For one shape. After a few shapes torch would give up compiling and run the unfused one, but for `fullgraph`."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)
