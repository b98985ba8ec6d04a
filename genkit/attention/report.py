"""What an audit found, as data and as a table."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COUNTS = ("fused", "unfused", "unproven", "fused_backward", "unfused_backward", "unproven_backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleAttention:
    """The attention calls of one module.

    Args:
        path: of the module, or the line of code outside all modules.
        fused, unfused, unproven: calls of the forward pass; what a backward pass computes again counts as a call.
        fused_backward, unfused_backward, unproven_backward: their backward passes.
        kernels: names of the operators.
        reason: why a call is not fused, or not proven to be.
    """

    path: str
    fused: int = 0
    unfused: int = 0
    unproven: int = 0
    fused_backward: int = 0
    unfused_backward: int = 0
    unproven_backward: int = 0
    kernels: tuple[str, ...] = ()
    reason: str = ""

    def joined(self, other: ModuleAttention) -> ModuleAttention:
        """The calls of the same module in two reports."""
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        kernels = tuple(dict.fromkeys(self.kernels + other.kernels))
        return ModuleAttention(path=self.path, kernels=kernels, reason=self.reason or other.reason, **counts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: path, forward and backward counts, kernels, reason."""
        return {
            "path": self.path,
            "forward": {"fused": self.fused, "unfused": self.unfused, "unproven": self.unproven},
            "backward": {"fused": self.fused_backward, "unfused": self.unfused_backward, "unproven": self.unproven_backward},
            "kernels": list(self.kernels),
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionReport:
    """What `audit` counted. `fused`, `unfused` and `unproven` are calls of all modules, forward and backward together."""

    modules: tuple[ModuleAttention, ...] = ()

    @property
    def fused(self) -> int:
        return sum(m.fused + m.fused_backward for m in self.modules)

    @property
    def unfused(self) -> int:
        return sum(m.unfused + m.unfused_backward for m in self.modules)

    @property
    def unproven(self) -> int:
        return sum(m.unproven + m.unproven_backward for m in self.modules)

    def __add__(self, other: AttentionReport) -> AttentionReport:
        """Both, module by module."""
        merged = {module.path: module for module in self.modules}
        for module in other.modules:
            merged[module.path] = merged[module.path].joined(module) if module.path in merged else module
        return AttentionReport(modules=tuple(merged.values()))

    def to_dict(self) -> dict[str, Any]:
        """{"fused", "unfused", "unproven", "modules": [...]} as JSON values, for each module what `ModuleAttention.to_dict` has."""
        modules = [module.to_dict() for module in self.modules]
        return {"fused": self.fused, "unfused": self.unfused, "unproven": self.unproven, "modules": modules}

    def table(self) -> Table:
        """For people, with `rich`: modules whose paths differ in numbers only share a row."""
        from rich.table import Table
        from rich.text import Text

        table = Table("module", "modules", "fused", "unfused", "unproven", "kernel", box=None, pad_edge=False, show_footer=True)
        totals = (str(len(self.modules)), str(self.fused), str(self.unfused), str(self.unproven))
        table.columns[0].overflow = table.columns[-1].overflow = "fold"
        for column, total in zip(table.columns, ("all", *totals, ""), strict=True):
            column.footer = total
        for pattern, members in self._groups().items():
            counts = [_pair(members, what) for what in ("fused", "unfused", "unproven")]
            styles = ("", "bold red" if counts[1] != "0" else "", "yellow" if counts[2] != "0" else "")
            cells = [Text(count, style=style) for count, style in zip(counts, styles, strict=True)]
            kernels = ", ".join(dict.fromkeys(name for member in members for name in member.kernels))
            reason = next((member.reason for member in members if member.reason), "")
            table.add_row(Text(pattern), str(len(members)), *cells, Text(f"{kernels}: {reason}" if reason else kernels))
        return table

    def _groups(self) -> dict[str, list[ModuleAttention]]:
        """Modules by their paths with numbers left out, and by whether they are fused."""
        groups: dict[tuple[str, bool], list[ModuleAttention]] = {}
        for module in self.modules:
            clean = module.unfused + module.unproven == 0
            groups.setdefault((re.sub(r"\.\d+", ".*", module.path), clean), []).append(module)
        named: dict[str, list[ModuleAttention]] = {}
        for (pattern, _), members in groups.items():
            name = members[0].path if len(members) == 1 else pattern
            named[name if name not in named else f"{name} (others)"] = members
        return named


def _pair(members: list[ModuleAttention], what: str) -> str:
    """ "12" forward calls, or "12 + 12" with backward ones."""
    forward, backward = (sum(getattr(member, name) for member in members) for name in (what, f"{what}_backward"))
    return f"{forward} + {backward}" if backward else str(forward)
