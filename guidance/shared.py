"""One evaluation of a network that several energies share.

    h = trunk(x),     U_1 = head_1(h),  U_2 = head_2(h),  ...

Energies that are evaluated jointly see the same tensor x, so the trunk's result can be kept by the identity of what it was given.
The memory lasts for the forward passes of one joint evaluation, never longer, so it holds no graph afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_memory: ContextVar[dict[Any, Any] | None] = ContextVar("genkit.guidance.shared", default=None)


def shared(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, run once for the same arguments within a joint evaluation of energies; elsewhere simply run.

    Args:
        function: a module, a module's bound method or a function; the same one in every energy, and the same at every call (in
            eval mode, without changes in between).
        arguments: tensors and other objects count as the same if they are one object; numbers, strings and tuples of them if they
            are equal.

    Example:
        >>> class RatioEnergy:
        ...     def __call__(self, x, level):
        ...         return self.head(shared(self.trunk, x, level))[:, 0]
    """
    memory = _memory.get()
    if memory is None:
        return function(*arguments)
    key = (function, torch.is_grad_enabled(), *map(_identity, arguments))
    if key not in memory:
        # The arguments are kept too: Python may give the identity of an object that is gone to another.
        memory[key] = arguments, function(*arguments)
    return memory[key][1]


@contextmanager
def sharing() -> Iterator[None]:
    """Within the block, `shared` remembers; what it remembers is dropped at the end. Inner blocks remember for themselves.

    `differentiate`, and so the joint evaluation of energies, opens one around the forward pass and closes it before the backward.
    """
    token = _memory.set({})
    try:
        yield
    finally:
        _memory.reset(token)


def _identity(argument: Any) -> Any:
    return (type(argument), argument) if isinstance(argument, (int, float, str, tuple, type(None))) else id(argument)
