"""`strict()`: unfused attention is an error. The two exceptions have names, and are counted.

    strict(model)       raises at the first unfused call, names the module, and says why
    tolerant(model)     counts unfused calls and warns once for each module
    second_order()      a scope in which attention may be unfused, since no fused kernel has a derivative of its derivative
    jvp_fallback()      the same for forward-mode derivatives

Guards are for the whole process, as `torch.nn.attention.sdpa_kernel` is. They nest: a strict one raises whatever is inside it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections import ChainMap, Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from genkit.attention.fallback import Fallback, listening
from genkit.attention.places import here, paths_of
from genkit.errors import UnfusedAttentionError, UnfusedAttentionWarning

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
        self,
        models: Sequence[Any] = (),
        *,
        raises: bool = False,
        excuse: str | None = None,
        note: str = "",
        log: AttentionLog | None = None,
    ) -> None:
        self.models, self.raises, self.excuse, self.note = models, raises, excuse, note
        self.log = AttentionLog() if log is None else log

    @functools.cached_property
    def paths(self) -> dict[int, str]:
        """The names of the models' modules, made when they are needed."""
        return paths_of(*self.models)


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

    refuse_never(*models)
    with guarding(*models, raises=True) as log, Watch(*models, on_unfused=refuse) if watch else nullcontext():
        yield log


def refuse_never(*models: Any) -> None:
    """Raise for parts of models that can never fuse.

    Raises:
        UnfusedAttentionError: names the first of them.
    """
    from genkit.attention.linting import lint

    never = [finding.text for finding in lint(*models) if finding.never]
    if never:
        raise UnfusedAttentionError(never[0] + (f" There are {len(never) - 1} more." if never[1:] else ""))


def tolerant(*models: Any) -> Any:
    """Inside the block, unfused attention runs, is counted, and is warned of once for each module. Yields the counts."""
    return guarding(*models)


@contextmanager
def guarding(*models: Any, raises: bool = False, log: AttentionLog | None = None) -> Iterator[AttentionLog]:
    """A guard that refuses, or counts; in a log that is there, if it is given."""
    guard = _Guard(models, raises=raises, log=log)
    with _opened(guard):
        yield guard.log


@contextmanager
def excused(name: str) -> Iterator[None]:
    """A named exception: inside the block attention may be unfused, and every guard around it counts the calls under the name."""
    with sdpa_kernel(SDPBackend.MATH), _opened(_Guard(excuse=name)):
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
            refuse(here(_known_paths()).path, call.reason(), guard.note)
    for guard in _guards:
        if guard.excuse is None and excuse is not None:
            if not guard.log.exceptions[excuse]:
                logger.info("Unfused attention in %s, allowed as %r.", here(_known_paths()).path, excuse)
            guard.log.exceptions[excuse] += 1
        elif guard.excuse is None:
            _count(guard, call)


def _known_paths() -> Mapping[int, str]:
    return ChainMap(*[guard.paths for guard in reversed(_guards)])


def refuse(path: str, reason: str, note: str = "") -> None:
    """Raise `UnfusedAttentionError` for the attention of a module."""
    raise UnfusedAttentionError(f"The attention of {path} is not fused{note}: {reason}.")


def warn(text: str) -> None:
    """Say that attention is not fused, once for each text."""
    warnings.warn(text, UnfusedAttentionWarning, stacklevel=2)


def _count(guard: _Guard, call: Fallback) -> None:
    path = here(_known_paths()).path
    if not guard.log.fallbacks[path]:
        guard.log.reasons[path] = call.reason()
        warn(f"The attention of {path} is not fused: {guard.log.reasons[path]}.")
    guard.log.fallbacks[path] += 1
