"""Reading pickles of numpy arrays, such as the model zoo's weights, without trusting them.

Unpickling runs what the file says. Even a pickle that may only name numpy's own functions can
corrupt memory, by changing a dtype after the array was made. So every global that such a file
names is given a stand-in here, and the arrays are made from the bytes it collects.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import IO, Any

import numpy as np


def load_arrays(file: IO[bytes]) -> Any:
    """The content of a pickle (protocols 0 to 5) of plain data and arrays of numbers.

    Raises:
        pickle.UnpicklingError: the file names anything else.
    """
    return _resolve(_ArrayUnpickler(file, encoding="latin1").load())


class _DType:
    def __init__(self, spec: str, *_: Any) -> None:
        self.dtype = np.dtype(str(spec))
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"an array of {self.dtype}, not of numbers")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What ``numpy`` calls ``_reconstruct``: empty at first, filled by its state."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | np.generic = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_bytes(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _from_buffer(raw: Any, dtype: _DType, shape: tuple, order: str, *_: Any) -> _Array:
    array = _Array()
    array.value = _from_bytes(raw, dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return array


def _scalar(dtype: _DType, raw: Any) -> _Array:
    array = _Array()
    array.value = _from_bytes(raw, dtype)[0]
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _from_bytes(raw: Any, dtype: _DType) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, dtype.dtype).copy()


_STAND_INS: dict[str, Any] = {
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": bytes,
} | {
    f"numpy.{core}.{name}": stand_in
    for core in ("core", "_core")  # numpy 1, numpy 2
    for name, stand_in in [
        ("multiarray._reconstruct", _Array),
        ("multiarray.scalar", _scalar),
        ("numeric._frombuffer", _from_buffer),
    ]
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array") from None


def _resolve(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {k: _resolve(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(v) for v in value)
    return value
