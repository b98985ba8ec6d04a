"""What a run's attention was really computed with: the account that goes into side-car files, logs and cards.

    guard      the whole run, for free: each call that falls back to unfused attention is refused (`--attn strict`), or counted, and
               said once for each module (`--attn auto`, the default: a run never ends because of its attention)
    audit      the first step of each kind, operator by operator: what is fused, what is written by hand, what is not provable

Neither changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from genkit import _host
from genkit.attention.auditing import COMPILED, Watch
from genkit.attention.backends import current_mode
from genkit.attention.choices import AUTO, POLICIES, STRICT
from genkit.attention.guard import AttentionLog, guarding, refuse, refuse_never, warn
from genkit.attention.linting import lint
from genkit.attention.places import modules_of, paths_of
from genkit.attention.report import AttentionReport, ModuleAttention


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of models from earlier runs, by their state: reports by kind of step, and the paths of what never fuses."""

    reports: dict[Hashable, AttentionReport] = dataclasses.field(default_factory=dict)
    never: dict[Hashable, tuple[str, ...]] = dataclasses.field(default_factory=dict)


class Proof:
    """The account of a run: enter it around the run, or around each part of it, and `step` around its steps.

    Args:
        models: what runs: pipelines, denoisers, modules.
        known: of earlier runs of the same models; what is in it is not found out again. It is added to.
        audits: False guards only; for runs whose account nobody reads.

    Attributes:
        mode: the choice of the `use_attention` around it.
        report: the audited steps, each once.
        log: unfused calls and named exceptions of the whole run.

    Raises:
        UnfusedAttentionError: in mode "strict", on entry for what can never fuse, and from within.

    Example:
        >>> with Proof(network) as proof:
        ...     for k in range(100):
        ...         with proof.step("update"):
        ...             loss(network).backward()
        >>> proof.to_dict()
    """

    def __init__(self, *models: Any, known: Known | None = None, audits: bool = True) -> None:
        self.models, self.known, self.audits, self.mode = models, known or Known(), audits, AUTO
        self.report, self.log = AttentionReport(), AttentionLog()
        self._steps: set[Hashable] = set()
        self._state: Hashable = None
        self._compiled: list[nn.Module] = []
        self._open: list[ExitStack] = []

    def __enter__(self) -> Proof:
        self.mode = current_mode()
        self._state, self._compiled = _survey(*self.models)
        if self._state not in self.known.never or (self.mode == STRICT and self.known.never[self._state]):
            self.known.never[self._state] = check(*self.models)
        stack = ExitStack()
        stack.enter_context(guarding(*self.models, raises=self.mode == STRICT, log=self.log))
        _running.append(self)
        stack.callback(_running.remove, self)
        self._open.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.pop().close()

    @contextmanager
    def step(self, *kind: Hashable, fresh: bool = False) -> Iterator[None]:
        """Audit the block, if it is the run's first of its kind.

        Args:
            kind: what tells steps apart that may compute attention in different ways, such as the shape.
            fresh: audit it even if an earlier run had one of this kind.
        """
        if not self.audits or kind in self._steps:
            yield
            return
        self._steps.add(kind)
        key, reports = (self._state, kind), self.known.reports
        if self._compiled:
            # Under an audit they would run without being compiled, which changes bits.
            yield
            report = self._unproven()
        elif key in reports and not fresh and not (self.mode == STRICT and reports[key].unfused):
            yield
            report = reports[key]
        else:
            with Watch(*self.models, on_unfused=refuse if self.mode == STRICT else None) as watch:
                yield
            report = reports[key] = watch.report()
            self._say(report)
        self.report += report

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: mode, calls of the audited steps, modules that are not fused, fall-backs and exceptions of the run."""
        return {
            "mode": self.mode,
            "fused": self.report.fused,
            "unfused": self.report.unfused,
            "unproven": self.report.unproven,
            "modules": [module.to_dict() for module in self.report.modules if module.unfused or module.unproven],
            "fallbacks": [{"path": path, "calls": n, "reason": self.log.reasons[path]} for path, n in self.log.fallbacks.items()],
            "exceptions": dict(self.log.exceptions),
        }

    def _unproven(self) -> AttentionReport:
        """The compiled modules, each an unproven call, once."""
        paths, told = paths_of(*self.models), {module.path for module in self.report.modules}
        compiled = [ModuleAttention(path=paths[id(module)], unproven=1, reason=COMPILED) for module in self._compiled]
        return AttentionReport(modules=tuple(module for module in compiled if module.path not in told))

    def _say(self, report: AttentionReport) -> None:
        """Warn of attention that is written by hand. Of the rest, the guard and the lint have warned."""
        said = (*self.log.fallbacks, *self.known.never[self._state])
        found = [m for m in report.modules if m.unfused and not (said and m.path.startswith(said))]
        if found and self.mode not in ("math", STRICT):
            more = f" There are {len(found) - 1} more." if found[1:] else ""
            warn(f"The attention of {found[0].path} is not fused: {found[0].reason}.{more}")


def check(*models: Any) -> tuple[str, ...]:
    """Say, once, what can never fuse in models that are about to be used; the paths of it.

    Raises:
        UnfusedAttentionError: in mode "strict".
    """
    if current_mode() == STRICT:
        refuse_never(*models)
    found = [finding for finding in lint(*models) if finding.never]
    if found:
        warn(found[0].text + (f" There are {len(found) - 1} more." if found[1:] else ""))
    return tuple(finding.path for finding in found)


_running: list[Proof] = []


@contextmanager
def proving(proof: Proof) -> Iterator[Proof]:
    """The proof that is open around the block, or else this one, entered."""
    if _running:
        yield _running[-1]
        return
    with proof:
        yield proof


def _survey(*models: Any) -> tuple[Hashable, list[nn.Module]]:
    """What a report depends on besides the step (the choice, the classes that compute attention), and the compiled modules."""
    compiled, state = [], ["" if current_mode() in POLICIES else current_mode()]
    for model in modules_of(*models).values():
        state.append(str(getattr(getattr(model, "config", None), "_attn_implementation", None)))
        for module in model.modules():
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                compiled.append(module)
            processor: Any = module.__dict__.get("processor") or module._modules.get("processor")
            if processor is not None:
                state += [type(processor).__qualname__, str(_host.attention_backend(processor))]
    return tuple(state), compiled
