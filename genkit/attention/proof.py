"""What a run's attention was really computed with: the account that goes into side-car files, logs and cards.

    guard      the whole run, for free: each call that falls back to unfused attention is refused (`--attn strict`), or counted, and
               said once for each module (`--attn auto`, the default: a run never ends because of its attention)
    audit      the first step of each kind, operator by operator: what is fused, what is written by hand, what is not provable

Neither changes a bit of the result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from genkit import _host
from genkit.attention.auditing import COMPILED, Watch
from genkit.attention.backends import current_mode
from genkit.attention.choices import AUTO, POLICIES, STRICT
from genkit.attention.guard import AttentionLog, guarding, refuse, refuse_never, warn
from genkit.attention.linting import lint
from genkit.attention.places import modules_of, paths_of
from genkit.attention.report import AttentionReport, ModuleAttention

Known = dict[Hashable, AttentionReport]


class Proof:
    """The account of a run: enter it around the run, or around each part of it, and `step` around its steps.

    Args:
        models: what runs: pipelines, denoisers, modules.
        known: reports of earlier runs of the same models by kind of step, which are not made again; it is added to.
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
        self.models, self.known, self.audits, self.mode = models, {} if known is None else known, audits, AUTO
        self.report, self.log = AttentionReport(), AttentionLog()
        self._steps: set[Hashable] = set()
        self._never: tuple[str, ...] | None = None
        self._open: list[ExitStack] = []

    def __enter__(self) -> Proof:
        self.mode = current_mode()
        if self.mode == STRICT or self._never is None:
            self._never = check(*self.models)
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
        key = (_state_of(*self.models), kind)
        compiled = _compiled(*self.models)
        if compiled:
            # Under an audit they would run without being compiled, which changes bits.
            yield
            told = {module.path for module in self.report.modules}
            report = AttentionReport(modules=tuple(module for module in compiled if module.path not in told))
        elif key in self.known and not fresh and not (self.mode == STRICT and self.known[key].unfused):
            yield
            report = self.known[key]
        else:
            with Watch(*self.models, on_unfused=refuse if self.mode == STRICT else None) as watch:
                yield
            report = self.known[key] = watch.report()
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

    def _say(self, report: AttentionReport) -> None:
        """Warn of attention that is written by hand. Of the rest, the guard and the lint have warned."""
        said = (*self.log.fallbacks, *(self._never or ()))
        found = [m for m in report.modules if m.unfused and not m.path.startswith(said)] if said else report.modules
        found = [m for m in found if m.unfused]
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


def _compiled(*models: Any) -> tuple[ModuleAttention, ...]:
    """The compiled modules, each an unproven call."""
    modules = [m for model in modules_of(*models).values() for m in model.modules()]
    compiled = [m for m in modules if getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod")]
    paths = paths_of(*models) if compiled else {}
    return tuple(ModuleAttention(path=paths[id(module)], unproven=1, reason=COMPILED) for module in compiled)


def _state_of(*models: Any) -> Hashable:
    """What a report depends on besides the step: how attention is computed, and by which classes."""
    modules = [m for model in modules_of(*models).values() for m in model.modules()]
    processors = [m.processor for m in modules if getattr(m, "processor", None) is not None]
    mode = current_mode()
    return "" if mode in POLICIES else mode, tuple((type(p).__qualname__, _host.attention_backend(p)) for p in processors)
