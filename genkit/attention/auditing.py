"""`audit(fn)`: which attention a function really ran, operator by operator, forward and backward.

    fused      a kernel that never has the L x S matrix in memory
    unfused    softmax(Q K^T) V in separate operators, whether SDPA fell back to it or somebody wrote it
    unproven   an opaque operator, a compiled region, or a softmax between products whose scores come from elsewhere

It looks at operators, not at names of layers: a mode of torch's dispatcher sees each one below autograd. Scores are followed by the
memory they lie in: a product of two activations makes scores, a softmax of scores makes probabilities, everything pointwise keeps
them what they are, and a product with probabilities is attention. Under such a mode torch runs compiled functions eagerly, so what
they really run is not seen, and is called unproven.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from genkit.attention.fallback import MATH, Fallback, listening, math, running
from genkit.attention.operators import Kind, kind_of, short_name
from genkit.attention.places import Place, here, paths_of
from genkit.attention.report import AttentionReport, ModuleAttention

COMPILED = "in a region that torch.compile would compile"
BY_HAND = "matmul, softmax and matmul in separate operators"


def audit(fn: Callable[[], Any], *models: Any) -> AttentionReport:
    """Run a function and count its attention calls by module, forward and backward.

    Args:
        fn: what to run, once; call `.backward()` in it to see the backward pass too.
        models: modules, pipelines or denoisers, for the names of modules; paths start with a class without them.

    Returns:
        The counts. What `fn` raises is raised.

    Example:
        >>> report = audit(lambda: pipe("a red seven", num_inference_steps=1), pipe)
        >>> report.fused, report.unfused, report.unproven
        >>> rich.print(report.table())
    """
    with Watch(*models) as watch:
        fn()
    return watch.report()


@dataclasses.dataclass(eq=False)
class _Softmax:
    """Probabilities, and whether they have met values yet."""

    place: Place
    of_scores: bool
    reason: str
    counted: bool = False


_SCORES, _WEIGHTS = "scores", "weights"
_Mark = _Softmax | str | None


class Watch(TorchDispatchMode):
    """Counts attention while it is entered.

    Args:
        models: for the names of modules.
        on_unfused: called with (path, reason) at every unfused call.
    """

    supports_higher_order_operators = True

    def __init__(self, *models: Any, on_unfused: Callable[[str, str], None] | None = None) -> None:
        super().__init__()
        self.paths, self.on_unfused = paths_of(*models), on_unfused
        self.counts: dict[str, ModuleAttention] = {}
        self._marks: dict[int, _Mark] = {}  # by the address of the storage
        self._calls: dict[int, Place] = {}  # of fused calls, by the address of their log-sum-exp
        self._open = ExitStack()

    def __enter__(self) -> Watch:
        # Without a listener the fall-back would not be seen while it runs.
        self._open.enter_context(listening(_ignore))
        # Torch compiles nothing under such a mode, and fails where it must (fullgraph, flex_attention).
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def report(self) -> AttentionReport:
        """What was counted so far."""
        return AttentionReport(modules=tuple(self.counts.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, kind_of(func)
        if kind is Kind.COMPOSITE:
            # Only inference mode shows it whole; taken apart, its operators come by here.
            super().__enter__()
            try:
                return (math if func is MATH else func.decompose)(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if kind is Kind.OPAQUE or kind is Kind.UNFUSED:
            return self._whole(func, kind, args, kwargs)
        inputs = list(_tensors((args, kwargs)))
        output = func(*args, **kwargs)
        addresses = [_address(value) for value in inputs]
        self._forget(address for address in map(_address, _tensors(output)) if address not in addresses)
        if kind is Kind.FUSED:
            self._fused(func, output)
        elif kind is Kind.FUSED_BACKWARD:
            place = next((self._calls[a] for a in addresses[1:] if a in self._calls), Place("(unknown)"))
            self._count(place, "fused_backward", short_name(func))
        elif kind is Kind.SOFTMAX_BACKWARD:
            self._softmax_backward(addresses)
        else:
            self._follow(kind, inputs, addresses, output)
        return output

    def _whole(self, func: Any, kind: Kind, args: Any, kwargs: Any) -> Any:
        """An operator that is a whole attention."""
        place = here(self.paths)
        if kind is Kind.OPAQUE:
            self._count(place, "unproven", short_name(func), "an opaque operator")
        else:
            self._count(place, "unfused", short_name(func), "flex_attention without torch.compile is unfused")
        return func(*args, **kwargs)

    def _fused(self, func: Any, output: Any) -> None:
        place = here(self.paths)
        self._count(place, "fused", short_name(func))
        outputs = [value for value in _tensors(output) if value.numel()]
        if torch.is_grad_enabled() and outputs:
            self._calls[_address(outputs[min(1, len(outputs) - 1)])] = place

    def _forget(self, addresses: Iterable[int]) -> None:
        """What was known of memory before something else came to lie there."""
        for address in addresses:
            self._marks.pop(address, None)
            self._calls.pop(address, None)

    def _softmax_backward(self, addresses: list[int]) -> None:
        marks = [self._marks.get(address) for address in addresses]
        softmax = next((mark for mark in marks if isinstance(mark, _Softmax)), None)
        if softmax is not None and softmax.counted:
            self._count(softmax.place, "unfused_backward" if softmax.of_scores else "unproven_backward", "softmax")

    def _follow(self, kind: Kind, inputs: list[Tensor], addresses: list[int], output: Any) -> None:
        """Mark what comes out by what went in."""
        for value, address in zip(inputs, addresses, strict=True):
            if isinstance(value, nn.Parameter):
                self._marks[address] = _WEIGHTS  # and so are its views
        mark = self._mark(kind, [self._marks.get(address) for address in addresses])
        if mark is not None:
            self._marks |= dict.fromkeys(map(_address, _tensors(output)), mark)
        self._marks.pop(0, None)

    def _mark(self, kind: Kind, marks: list[_Mark]) -> _Mark:
        softmax = next((mark for mark in marks if isinstance(mark, _Softmax)), None)
        if kind in (Kind.SOFTMAX, Kind.EXP):
            call = running()
            if call is None and kind is Kind.EXP and _SCORES not in marks:
                return softmax
            reason = BY_HAND if call is None else call.reason()
            return _Softmax(here(self.paths), call is not None or _SCORES in marks, reason)
        if kind is Kind.PRODUCT or (kind is Kind.LINEAR and _WEIGHTS not in marks):
            if softmax is None:
                return _SCORES
            self._attended(softmax)
            return None
        if kind is Kind.ENDS:
            return None
        # A layer with weights may mix the scores of several heads.
        if softmax is not None or _SCORES in marks:
            return softmax or _SCORES
        return _WEIGHTS if marks and kind is Kind.CARRIES and all(mark == _WEIGHTS for mark in marks) else None

    def _attended(self, softmax: _Softmax) -> None:
        """Probabilities were multiplied with values."""
        if softmax.counted:
            return
        softmax.counted = True
        reason = softmax.reason if softmax.of_scores else "a softmax of what is no product of two activations"
        self._count(softmax.place, "unfused" if softmax.of_scores else "unproven", "softmax", reason)

    def _count(self, place: Place, what: str, name: str, reason: str = "") -> None:
        # Unfused it would be as well, if compiling did not help it; fused it might be.
        if place.compiled and what in ("fused", "unfused"):
            what, reason = "unproven", COMPILED
        old = self.counts.get(place.path) or ModuleAttention(path=place.path)
        kernels = old.kernels if name in old.kernels or what.endswith("backward") else (*old.kernels, name)
        changed: dict[str, Any] = {what: getattr(old, what) + 1, "kernels": kernels, "reason": old.reason or reason}
        self.counts[place.path] = dataclasses.replace(old, **changed)
        if what == "unfused" and self.on_unfused is not None:
            self.on_unfused(place.path, reason)


def _ignore(call: Fallback) -> None:
    """Listens for the sake of `running`."""


def _address(value: Tensor) -> int:
    """Of the memory that a tensor lies in, for the time that it is alive; 0 where it has none."""
    try:
        return 0 if value.device.type == "meta" else value.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, fake and quantised tensors
        return 0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
