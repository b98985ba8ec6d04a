"""Pickles of arrays and plain values: read as pickle reads them, and nothing else is."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest

from genkit.data.array_pickle import load

ARRAYS = [
    np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.array([1, 2], ">i4"), np.array([True, False]),
    np.array(["a", "long"]), np.array([b"a", b"bc"]), np.zeros((0, 3), np.float32), np.array(3.5), np.array([1j]),
    np.array([np.float16(2)]), np.array({"a": [1, (2, "x")]}, dtype=object), np.array([[1, 2], None], dtype=object),
]  # fmt: skip


def read(content: bytes) -> Any:
    return load(io.BytesIO(content))


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("array", ARRAYS, ids=[f"{a.dtype}-{a.ndim}" for a in ARRAYS])
def test_arrays(array: np.ndarray, protocol: int) -> None:
    found = read(pickle.dumps({"points": array}, protocol))["points"]
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.tolist() == array.tolist()
    found[...] = 0  # it can be written


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_values(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True], (1, "b"): {3}, "bytes": (b"", b"\xff"), "c": 1j, "s": slice(1, 2), "n": np.float32(1.5)}
    assert read(pickle.dumps(value, protocol)) == value
    assert isinstance(read(pickle.dumps(value, protocol))["n"], np.float32)


def test_what_is_shared_stays_shared() -> None:
    array = np.arange(3)
    both = np.array([array, None], dtype=object)
    found = read(pickle.dumps([array, {"again": array, "inside": both}], 4))
    assert found[0] is found[1]["again"]
    assert found[0] is found[1]["inside"][0]
    ring: list[Any] = []
    ring.append({"ring": ring})
    found = read(pickle.dumps(ring, 4))
    assert found[0]["ring"] is found
    nested: list[Any] = []
    for _ in range(60):  # 2^60 lists, if each were read as often as it is referred to
        nested = [nested, nested]
    assert len(read(pickle.dumps(nested, 4))) == 2


class Calls:
    """Is pickled as a call, with a state if one is given."""

    def __init__(self, call: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (call, arguments) if state is None else (call, arguments, state)

    def __reduce__(self) -> tuple:
        return self.reduced


RECONSTRUCT = np.arange(3).__reduce__()[0]
INT = np.dtype("i8")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (Calls(print, "acted"), r"builtins\.print"),
        (Calls(str, [1]), r"builtins\.str"),
        (Calls(bytes, 2**40), "argument"),
        (Calls(np.dtype, [("a", "i4")]), "neither of numbers nor of texts"),
        (Calls(np.dtype, "V2000000000"), "neither of numbers nor of texts"),
        (Calls(np.dtype, "i8", state=(3, "<", None, ("a",), {"a": (INT, 0)}, 8, 8, 16)), "structure"),
        (Calls(np.dtype, "i8", state=(3, "?", None, None, None, -1, -1, 0)), "structure"),
        (INT, "no plain value"),
        (np.ndarray, "no plain value"),
        (Calls(np.ndarray, (10**6, 10**6)), "no content"),
        (Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (10**9,), INT, False, b"12345678")), "number of bytes"),
        (Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (-1, -1), INT, False, b"12345678")), "the shape"),
        (Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2,), np.dtype("O"), False, [1])), "number of objects"),
        (Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (2,), "i8", False, b"")), "the shape"),
        (Calls(RECONSTRUCT, np.ndarray, (0,), b"b", state=[1]), "another state"),
        (Calls(np.float64(1).__reduce__()[0], np.dtype("O"), [1]), "no number and no text"),
    ],
)
def test_whatever_else_is_refused(value: Any, says: str) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError), match=says):
        read(pickle.dumps([value], 4))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"]r\xff\xff\xff\x7f.", "number 2147483647 of its memo"),
        (b"]p2147483647\n.", "number 2147483647 of its memo"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.", "BYTEARRAY8|expected"),
        (b"c_codecs\nencode\n}b.", "gives a state to something else"),
        (b"cnumpy\nndarray\n)b.", "gives a state to something else"),
        (b"Pid\n.", "instruction PERSID"),
        (b"(inumpy\nndarray\n.", "instruction INST"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "instruction NEWOBJ"),
        (b"B\xff\xff\xff\x7fabc.", "expected 2147483647 bytes"),
    ],
)
def test_instructions_that_take_memory_or_act(content: bytes, says: str) -> None:
    with pytest.raises((pickle.UnpicklingError, ValueError), match=says):
        read(content)


def test_encodings() -> None:
    for encoding, says in (("latin1", None), ("zlib", "encodes by 'zlib'")):
        content = b"c_codecs\nencode\n(X\x01\x00\x00\x00\xff".replace(b"\x01\x00\x00\x00\xff", b"\x02\x00\x00\x00\xc3\xbf")
        content += b"X" + len(encoding).to_bytes(4, "little") + encoding.encode() + b"tR."
        if says is None:
            assert read(content) == b"\xff"
        else:
            with pytest.raises(pickle.UnpicklingError, match=says):
                read(content)
