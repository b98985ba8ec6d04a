"""An unpickler of numpy arrays and plain values, for files that anyone may have made.

    pickle                                  here
    numpy.core.multiarray._reconstruct      `_Array`, whose state is checked before there is an array
    numpy.core.multiarray.scalar            of such an array of one value
    numpy.dtype                             `_DType`: numbers, texts and objects, in either byte order
    _codecs.encode, bytes                   as bytes are pickled: of a text in latin1, and of nothing
    set, complex, slice                     as they are

Whatever else is named is refused. numpy's own classes are not used: a dtype with a made-up state makes numpy crash, and an array
of a made-up shape takes any memory. Nor are the builtins that are never pickled by name. Before anything is made the instructions
are read through: those that plain values do not need are refused, and so is a number in the memo for which pickle would take
gigabytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

import numpy as np

_CODE = re.compile(r"\?|b1|[iuf][1248]|c8|c16|O8?|[SU][1-9]\d{0,5}")
_NEEDLESS = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
# What protocol 5 added is for bytearrays and buffers.
_INSTRUCTIONS = {code.name for code in pickletools.opcodes if code.proto <= 4} - _NEEDLESS
_ORDERS: dict[Any, Literal["<", ">", "="]] = {"<": "<", ">": ">", "=": "=", "|": "="}


def load(stream: BinaryIO) -> Any:
    """What is pickled in a stream.

    Raises:
        pickle.UnpicklingError: it names something else, or an array does not fit its state.
        Exception: whatever a damaged pickle makes of its few functions.
    """
    content = stream.read()
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has the instruction {instruction.name}")
        if "PUT" in instruction.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError(f"it has number {argument} of its memo")
    return _resolved(_Unpickler(io.BytesIO(content)).load(), {})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _Call(_KNOWN[module, name])


class _Call:
    """Something that a pickle may call, and not change."""

    __slots__ = ("_known",)

    def __init__(self, known: Callable[..., Any]) -> None:
        self._known = known

    def __call__(self, *arguments: Any) -> Any:
        return self._known(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it gives a state to something else than an array")


class _DType:
    """What a pickle says of a dtype."""

    def __init__(self, code: Any, *unused: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of {code!r:.50} is neither of numbers nor of texts")
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subdtype, names, fields, ...): sizes follow from the code, and structures are not plain.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _ORDERS or any(x is not None for x in state[2:5]):
            raise pickle.UnpicklingError("an array has a structure")
        self.order = _ORDERS[state[1]]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """What a pickle says of an array, until all of it is read: objects may refer to what comes later."""

    def __init__(self, *unused: Any) -> None:
        self.found: np.ndarray | None = None
        self.objects: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or self.found is not None:
            raise pickle.UnpicklingError("an array has another state than shape, dtype, order and content")
        _, shape, dtype, columns, content = state
        sizes = isinstance(shape, tuple) and len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
        if not sizes or not isinstance(dtype, _DType):
            raise pickle.UnpicklingError(f"an array has the shape {shape!r:.50}")
        kind, count = dtype.numpy(), math.prod(shape)
        if kind.hasobject:
            if not isinstance(content, list) or len(content) != count:
                raise pickle.UnpicklingError("an array has another number of objects than its shape")
            flat, self.objects = np.empty(count, object), content
        else:
            if not isinstance(content, bytes) or len(content) != count * kind.itemsize:
                raise pickle.UnpicklingError("an array has another number of bytes than its shape and dtype")
            flat = np.frombuffer(content, kind) if content else np.empty(count, kind)
            flat = flat.astype(kind.newbyteorder("="))  # a copy, which can be written
        self.found = flat.reshape(shape, order="F" if columns else "C")


def _scalar(dtype: Any, content: Any = b"") -> Any:
    array = _Array()
    if not isinstance(content, bytes):  # of objects
        raise pickle.UnpicklingError("a value is no number and no text")
    array.__setstate__((1, (), dtype, False, content))
    assert array.found is not None
    return array.found[()]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes by {encoding!r:.50}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode, ("numpy", "dtype"): _DType, ("numpy", "ndarray"): _Array,
}  # fmt: skip
for _core in ("core", "_core"):
    _KNOWN |= {(f"numpy.{_core}.multiarray", "_reconstruct"): _Array, (f"numpy.{_core}.multiarray", "scalar"): _scalar}
for _module in ("builtins", "__builtin__"):  # the second in protocols up to 2
    _KNOWN |= {(_module, kind.__name__): kind for kind in (set, complex, slice)} | {(_module, "bytes"): _empty_bytes}


def _resolved(value: Any, seen: dict[int, Any]) -> Any:
    """The value with arrays in the place of what was said of them; each object once, however often it is referred to."""
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, _Array):
        if value.found is None:
            raise pickle.UnpicklingError("an array has no content")
        seen[id(value)] = value, value.found
        for i, each in enumerate(value.objects):
            value.found.flat[i] = _resolved(each, seen)
        return value.found
    if isinstance(value, list):
        seen[id(value)] = value, value
        value[:] = [_resolved(each, seen) for each in value]
    elif isinstance(value, dict):
        seen[id(value)] = value, value
        for key, each in value.items():
            value[key] = _resolved(each, seen)
    elif isinstance(value, tuple):
        found = tuple(_resolved(each, seen) for each in value)
        seen[id(value)] = value, found
        return found
    elif isinstance(value, (_DType, _Call)):
        raise pickle.UnpicklingError("it is no plain value")
    return value
