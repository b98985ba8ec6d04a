"""griffe: the names that a package exports lazily (genkit/_lazy.py), as aliases of where they are defined; and examples.

griffe reads source without running it, so it sees `lazy_exports(__name__, {module: [names]})` as a call like any other.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe


class LazyExports(griffe.Extension):
    """Shows what packages export lazily, and examples as code."""

    def on_module_members(self, *, node: Any, mod: griffe.Module, **kwargs: Any) -> None:
        """Give a package its lazy names, and say that they are its public ones."""
        exported = [name for names in lazy_names(node).values() for name in names]
        for module, names in lazy_names(node).items():
            for name in names:
                mod.set_member(name, griffe.Alias(name, f"{mod.path}.{module}.{name}"))
        if exported:
            mod.exports = sorted(exported)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Sections that are called "Example" as griffe calls them, so that what they hold is shown as code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def lazy_names(tree: ast.AST) -> dict[str, list[str]]:
    """The public names of a package by the submodule that defines them; empty without `lazy_exports`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_exports":
            return ast.literal_eval(node.args[1])
    return {}
