"""`lint(model)`: which parts of a model will not run fused attention, found without running it, and what to change.

It reads configurations and the names in the bytecode of what computes attention, so it also knows classes that are newer than this
file; it cannot know shapes, dtypes and masks. What really runs is for `audit` to say.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from genkit import _host
from genkit.attention.places import modules_of

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
# Parameters from which attention makes a mask, which then wants a gradient as they do.
_BIASES = ("relative_position_bias", "relative_attention_bias", "attention_biases", "rel_pos")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A part of a model whose attention is not sure to fuse.

    Args:
        path: of the module.
        kind: "never": unfused in every call; "grad": unfused while its parameters require gradients; "depends": on how it is
            called; "unproven": what it runs cannot be seen.
        what: what it is.
        fix: what to change.
    """

    path: str
    kind: str
    what: str
    fix: str

    @property
    def never(self) -> bool:
        return self.kind == "never"

    @property
    def text(self) -> str:
        """For people."""
        never = "never fuses" if self.never else "may run unfused attention" if self.kind != "unproven" else "is not provably fused"
        return f"{self.path} {never} ({self.what}). {self.fix}"


def lint(*models: Any) -> tuple[Finding, ...]:
    """Look for attention that will not be fused.

    Args:
        models: modules, pipelines (of diffusers or genkit) or denoisers.

    Returns:
        What was found, in the order of the modules; nothing is good.

    Example:
        >>> for finding in lint(pipe):
        ...     print(finding.text)
    """
    found: list[Finding] = []
    for name, model in modules_of(*models).items():
        for path, module in model.named_modules():
            found += _look_at(f"{name}.{path}" if path else name, module)
    return tuple(found)


def _look_at(path: str, module: nn.Module) -> Iterator[Finding]:
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        yield Finding(path, "unproven", "it is compiled", "Audit it before it is compiled.")
    processor = getattr(module, "processor", None)
    if processor is not None and not isinstance(processor, str):
        yield from _processor(path, processor)
    if isinstance(module, nn.MultiheadAttention):
        yield Finding(path, "depends", "nn.MultiheadAttention", "Call it with need_weights=False.")
    elif _of_transformers(module):
        yield from _transformers(path, module)
    elif _by_hand(type(module).forward) or (
        getattr(module, "fused_attn", None) is False and "softmax" in _names(type(module).forward)
    ):
        advice = "Use a model whose attention is scaled_dot_product_attention."
        if hasattr(module, "fused_attn") and not _by_hand(type(module).forward):
            advice = "Allow it with timm.layers.set_fused_attn(True) before the model is made, or use another model."
        yield Finding(path, "never", f"{type(module).__name__} has matmul and softmax in separate operators", advice)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and (any(bias in name for bias in _BIASES) or _is_bias(path)):
            fix = "Call requires_grad_(False) on it, or run it under no_grad."
            yield Finding(path, "grad", f"its {name} is a mask that wants a gradient", fix)


def _is_bias(path: str) -> bool:
    return path.rpartition(".")[2] in _BIASES


def _processor(path: str, processor: Any) -> Iterator[Finding]:
    """A processor of diffusers."""
    name = type(processor).__name__
    if "get_attention_scores" in _names(type(processor).__call__):
        fix = "Use set_attn_processor(AttnProcessor2_0()), and no attention slicing."
        if "Added" in name:
            fix = "Use AttnAddedKVProcessor2_0."
        yield Finding(path, "never", name, fix)
    backend = _host.attention_backend(processor)
    if backend == "flex":
        yield Finding(path, "never", "backend flex, which diffusers does not compile", 'Use set_attention_backend("native").')
    elif backend == "_native_math":
        yield Finding(path, "never", f"backend {backend}", 'Use set_attention_backend("native").')
    elif backend is not None and not backend.startswith(("native", "_native", "xformers")):
        yield Finding(path, "unproven", f"backend {backend}", "Its kernels may be invisible to an audit.")


def _of_transformers(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(type(module), "_supports_sdpa")


def _transformers(path: str, module: Any) -> Iterator[Finding]:
    """A model of transformers; the modules inside it take their attention from its configuration."""
    if getattr(module.config, "_attn_implementation", None) != "eager" or not _has_attention(module):
        return
    if getattr(type(module), "_supports_sdpa", False):
        yield Finding(path, "never", 'attn_implementation="eager"', 'Call set_attn_implementation("sdpa").')
    else:
        what = f"{type(module).__name__} has no attention through scaled_dot_product_attention in transformers"
        yield Finding(path, "never", what, "Encode text once and outside of gradients, as genkit's condition(...) does.")


def _has_attention(module: nn.Module) -> bool:
    """Whether it has attention of its own, not only that of a model inside it."""
    inner = [child for child in module.modules() if child is not module and _of_transformers(child)]
    below = {id(part) for child in inner for part in child.modules()}
    return any("ttention" in type(part).__name__ for part in module.modules() if id(part) not in below)


def _by_hand(function: Callable[..., Any]) -> bool:
    """Whether a function has softmax and matrix products, and does not call `scaled_dot_product_attention`."""
    names = _names(function)
    return "softmax" in names and bool(names & {*_PRODUCTS, "@"}) and "scaled_dot_product_attention" not in names


@functools.cache
def _names(function: Callable[..., Any]) -> frozenset[str]:
    """The names that a function's code uses, and "@" if it has a matrix product."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not isinstance(code, CodeType):
        return frozenset()
    operators = {"@" for i in dis.get_instructions(code) if i.argrepr in ("@", "@=") or "MATRIX_MULTIPLY" in i.opname}
    return frozenset({*code.co_names, *operators})
