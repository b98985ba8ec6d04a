"""`strict()`: unfused attention is an error. The two exceptions have names, and are counted.

    strict(model)       raises at the first unfused call, names the module, and says why
    tolerant(model)     counts unfused calls and warns once for each module
    second_order()      a scope in which attention may be unfused, since no fused kernel has a derivative of its derivative
    jvp_fallback()      the same for forward-mode derivatives

Guards are for the whole process, as `torch.nn.attention.sdpa_kernel` is. They nest: a strict one raises whatever is inside it.
"""

from __future__ import annotations

import logging
import warnings
from collections import ChainMap, Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.attention.fallback import Fallback, listening
from genkit.attention.places import here, paths_of
from genkit.errors import UnfusedAttentionError

logger = logging.getLogger(__name__)

SECOND_ORDER, JVP = "second order", "jvp"


class AttentionLog:
    """What a guard saw.

    Attributes:
        fallbacks: unfused calls by module.
        reasons: why the first of them was unfused, by module.
        exceptions: unfused calls in named exceptions, by name.
    """

    def __init__(self) -> None:
        self.fallbacks: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.exceptions: Counter[str] = Counter()


class _Guard:
    """An open guard, or with `excuse` an open exception."""

    def __init__(
        self, *, raises: bool = False, excuse: str | None = None, paths: dict[int, str] | None = None, note: str = ""
    ) -> None:
        self.raises, self.excuse, self.paths, self.note, self.log = raises, excuse, paths or {}, note, AttentionLog()


_guards: list[_Guard] = []


@contextmanager
def strict(*models: Any, watch: bool = False) -> Iterator[AttentionLog]:
    """Inside the block, unfused attention is an error that names the module and the reason.

    Args:
        models: modules, pipelines or denoisers. Parts of them that can never fuse (see `lint`) are an error at once; messages name
            modules by their paths in them. Without models, paths start with a class.
        watch: also look at every operator for attention that was written by hand, as `audit` does. Slow; for tests.

    Yields:
        What was seen: named exceptions by count.

    Raises:
        UnfusedAttentionError: from the call itself, in the block.

    Example:
        >>> with strict(pipe):
        ...     pipe("a red seven")
    """
    from genkit.attention.auditing import Watch
    from genkit.attention.linting import lint

    never = [finding for finding in lint(*models) if finding.never]
    if never:
        raise UnfusedAttentionError(" ".join(finding.text for finding in never[:3]) + (" ..." if len(never) > 3 else ""))
    guard = _Guard(raises=True, paths=paths_of(*models))
    with ExitStack() as stack:
        stack.enter_context(_opened(guard))
        if watch:
            stack.enter_context(Watch(guard.paths, on_unfused=_refuse))
        yield guard.log


@contextmanager
def tolerant(*models: Any) -> Iterator[AttentionLog]:
    """Inside the block, unfused attention runs, is counted, and is warned of once for each module."""
    guard = _Guard(paths=paths_of(*models))
    with _opened(guard):
        yield guard.log


@contextmanager
def excused(name: str, *backends: SDPBackend) -> Iterator[None]:
    """A named exception: inside the block attention may be unfused, and every guard around it counts the calls under the name."""
    with sdpa_kernel(list(backends or (SDPBackend.MATH,))), _opened(_Guard(excuse=name)):
        yield


def only(note: str) -> Any:
    """A strict guard without models, for the call of one module; the note is added to its message."""
    return _opened(_Guard(raises=True, note=note))


def second_order() -> Any:
    """A scope for gradients of gradients through attention, as an exact R1 penalty has them: no fused kernel has them.

    Example:
        >>> with strict(), second_order():
        ...     gradient = torch.autograd.grad(logits.sum(), x, create_graph=True)
    """
    return excused(SECOND_ORDER)


def jvp_fallback() -> Any:
    """A scope for forward-mode derivatives (`torch.func.jvp`) through SDPA, which has none that are fused; see `attend_jvp`."""
    return excused(JVP)


@contextmanager
def _opened(guard: _Guard) -> Iterator[None]:
    with listening(_notice):
        _guards.append(guard)
        try:
            yield
        finally:
            _guards.remove(guard)


def _notice(call: Fallback) -> None:
    """Excuse, refuse or count an unfused call. An exception covers the guards around it, and those inside it that do not raise."""
    excuse = None
    for guard in reversed(_guards):
        if guard.excuse is not None:
            excuse = guard.excuse
            break
        if guard.raises:
            _refuse(here(ChainMap(*[found.paths for found in _guards])).path, call.reason(), guard.note)
    for guard in _guards:
        if guard.excuse is None and excuse is not None:
            if not guard.log.exceptions[excuse]:
                logger.info("Unfused attention in %s, allowed as %r.", here(guard.paths).path, excuse)
            guard.log.exceptions[excuse] += 1
        elif guard.excuse is None:
            _count(guard, call)


def _refuse(path: str, reason: str, note: str = "") -> None:
    raise UnfusedAttentionError(f"The attention of {path} is not fused{note}: {reason}.")


def _count(guard: _Guard, call: Fallback) -> None:
    path = here(guard.paths).path
    if not guard.log.fallbacks[path]:
        guard.log.reasons[path] = call.reason()
        warnings.warn(f"The attention of {path} is not fused: {guard.log.reasons[path]}.", stacklevel=2)
    guard.log.fallbacks[path] += 1
