"""A user's own function as guidance, by name: `mymodule:myfunction` or `path/to/file.py:myfunction`.

The function takes images (B, 3, H, W) in [-1, 1], and the noise level if it has a second argument, and returns a log-potential
(B,), larger is better. The module may hold a ready `Guidance` of that name instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from genkit.errors import unknown
from genkit.guidance.base import Guidance, State
from genkit.guidance.energy import EnergyGuidance, when


def load(source: str, name: str) -> Any:
    """The object `name` of a module or a Python file. The current folder can be imported from, as with `python -m`.

    Raises:
        ValueError: no such module, file or name; the import fails; or the object can not be called.
    """
    module = _import_file(source) if source.endswith(".py") else _import_module(source)
    if not hasattr(module, name):
        raise unknown(
            f"function of {source!r},", name, [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        )
    found = getattr(module, name)
    if not callable(found) or isinstance(found, type):
        kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise ValueError(
            f"{source}:{name} is {kind}, not a function of images. Name a function that returns one value for each image."
        )
    return found


class FunctionGuidance(EnergyGuidance):
    """An `EnergyGuidance` for the command line: an exception in the energy becomes a ValueError that names it and when."""

    def _call(self, z: Tensor, state: State) -> Tensor:
        try:
            return super()._call(z, state)
        except (FloatingPointError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(f"Guidance {self.name!r} failed at {when(state)} ({type(error).__name__}: {error}).") from error


def function_guidance(source: str, name: str, **arguments: Any) -> Guidance:
    """The guidance that a function makes; `arguments` are scale, route and space of `EnergyGuidance`.

    Raises:
        ValueError: see `load`; or a route or space for a ready guidance, which has its own.
    """
    found = load(source, name)
    if not isinstance(found, Guidance):
        return FunctionGuidance(found, **arguments, name=name)
    scale = arguments.pop("scale", 1)
    if arguments:
        raise ValueError(f"{source}:{name} is a ready guidance, which has its own {next(iter(arguments))}. Leave it out.")
    return found if scale == 1 else scale * found


def _import_module(source: str) -> ModuleType:
    _add_to_path(os.getcwd())
    try:
        importlib.invalidate_caches()
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(f"{error.name}.")):
            raise ValueError(
                f"There is no module {error.name!r}, neither in this folder nor installed. Check its name, or name a file: "
                f"--guidance path/to/{error.name}.py:FUNCTION."
            ) from error
        raise _import_failed(source, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(source, error) from error


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"There is no file {source!r}.")
    if str(path) in sys.modules:
        return sys.modules[str(path)]
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _add_to_path(str(path.parent))
    sys.modules[str(path)] = module  # dataclasses and pickle look a class's module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[str(path)]
        raise _import_failed(source, error) from error
    return module


def _import_failed(source: str, error: BaseException) -> ValueError:
    return ValueError(f"Importing {source!r} failed ({type(error).__name__}: {error}).")


def _add_to_path(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)
