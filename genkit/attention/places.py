"""Where in a model a call comes from: names of modules, found on Python's stack, so that no module needs a hook."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

from torch import nn

_CALL = nn.Module._wrapped_call_impl.__code__  # every call of a module goes through it
_TORCH = os.path.dirname(sys.modules["torch"].__file__ or "")
_COMPILER = os.path.join(_TORCH, "_dynamo", "eval_frame.py")
_FLEX = os.path.join(_TORCH, "nn", "attention", "flex_attention.py")


@dataclasses.dataclass(frozen=True)
class Place:
    """A module, or a line of code outside all modules.

    Args:
        path: "unet.mid_block.attentions.0...attn1", or "file.py:12 (function)".
        compiled: whether it is in a region that `torch.compile` would compile.
    """

    path: str
    compiled: bool = False


def modules_of(*models: Any) -> dict[str, nn.Module]:
    """The modules of pipelines (of diffusers or genkit), denoisers and modules, by name: "unet", "vae", or a module's class."""
    found: dict[str, nn.Module] = {}
    for model in models:
        if isinstance(model, nn.Module):
            found.setdefault(type(model).__name__, model)
            continue
        pipe = getattr(model, "pipe", getattr(model, "host", model))
        components = getattr(pipe, "components", None) or (vars(pipe) if hasattr(pipe, "__dict__") else {})
        found |= {name: value for name, value in components.items() if isinstance(value, nn.Module)}
    return found


def paths_of(*models: Any) -> dict[int, str]:
    """The path of every module in models, by its id."""
    paths: dict[int, str] = {}
    for name, model in modules_of(*models).items():
        for path, module in model.named_modules():
            paths.setdefault(id(module), f"{name}.{path}" if path else name)
    return paths


def here(paths: Mapping[int, str]) -> Place:
    """The innermost module that is being called, or the line of code where there is none.

    Args:
        paths: known modules, of `paths_of`; the path of another starts with the class of the outermost one.
    """
    modules: list[nn.Module] = []
    line, compiled, flex = "", False, False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            module = frame.f_locals["self"]
            modules.append(module)
            compiled = compiled or getattr(module, "_compiled_call_impl", None) is not None
            flex = False
        elif code.co_filename == _FLEX:
            flex = True  # which compiles itself, without fusing, where nothing around it does
        elif code.co_filename == _COMPILER and code.co_name == "compile_wrapper":
            compiled = compiled or not flex
        elif not code.co_filename.startswith((_TORCH, os.path.dirname(__file__))):
            line = line or f"{os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_name})"
            flex = False
        frame = frame.f_back
    return Place(_path(modules, paths) if modules else line, compiled)


def _path(modules: list[nn.Module], paths: Mapping[int, str]) -> str:
    """Of the first of modules that call each other, the innermost first."""
    if id(modules[0]) in paths:
        return paths[id(modules[0])]
    for outer in reversed(modules):
        for path, module in outer.named_modules():
            if module is modules[0]:
                root = paths.get(id(outer), type(outer).__name__)
                return f"{root}.{path}" if path else root
    return type(modules[0]).__name__
