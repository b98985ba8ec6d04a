"""What a network computes before any prompt matters: the same for all prompts, so computed once and repeated.

A UNet's input convolution, its first residual unit and its first self-attention see the noisy sample and the time alone: rows
(sample, prompt) of a batch share them wherever they share the sample.

Which modules these are is read off a run in which the prompts' tensors are marked: what is computed from a marked tensor is marked.
So it is right for any architecture: SDXL adds its pooled prompt to the time, which leaves two convolutions and no attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class Marked(Tensor):
    """A tensor that depends on a prompt. Torch makes everything that is computed from it one, too."""


class Stop(Exception):
    """Ends a pass of the network from within."""


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` of a module inside the block, below its hooks; then its own again."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def trace(network: nn.Module, rows: int, run: Callable[[], Any]) -> list[nn.Module]:
    """The modules that `run` completes before it raises `Stop`, and whose first output no prompt has touched; none within another.

    Args:
        rows: of the batch, at least 2; an output that has not as many is not taken.
    """
    done: dict[nn.Module, None] = {}
    called: set[nn.Module] = set()

    def completed(module: nn.Module, arguments: Any, output: Any) -> None:
        # A block may use one activation for the sample and for the time: only the first call counts.
        if module in called:
            return
        called.add(module)
        if _tensors(output) and all(len(t) == rows and not isinstance(t, Marked) for t in _tensors(output)):
            for inner in module.modules():
                done.pop(inner, None)
            done[module] = None

    hooks = [module.register_forward_hook(completed) for module in network.modules()]
    try:
        with suppress(Stop):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(done)


def record(modules: list[nn.Module], run: Callable[[], Any]) -> list[Any]:
    """The outputs of modules in `run`, which ends with the last of them."""
    outputs: dict[nn.Module, Any] = {}

    def recording(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*arguments: Any, **named: Any) -> Any:
            output = forward(*arguments, **named)
            outputs.setdefault(module, output)
            if len(outputs) == len(modules):
                raise Stop
            return output

        return call

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, recording(module)))
        with suppress(Stop):
            run()
    return [outputs[module] for module in modules]


@contextmanager
def replayed(modules: list[nn.Module], outputs: list[Any], index: Tensor) -> Iterator[None]:
    """In the block, the first call of each module returns the rows `index` (B,) of its output instead of computing it."""
    left = dict(zip(modules, outputs, strict=True))

    def replaying(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        def call(*arguments: Any, **named: Any) -> Any:
            return _rows(left.pop(module), index) if module in left else forward(*arguments, **named)

        return call

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(replaced(module, replaying(module)))
        yield


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of an output; none of one that is not made of tensors alone."""
    values = output if isinstance(output, tuple) else (output,)
    return list(values) if all(isinstance(value, Tensor) and value.ndim for value in values) else []


def _rows(output: Any, index: Tensor) -> Any:
    if isinstance(output, tuple):
        return tuple(_rows(value, index) for value in output)
    return torch.index_select(output, 0, index)
