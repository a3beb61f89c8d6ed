"""The pickles that published statistics come in: plain arrays in dicts, and nothing is run."""

import os
import pickle
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError

MAX_BYTES = 1 << 30


def read(path: str | os.PathLike) -> Any:
    """What a pickle of dicts, lists, numbers, text and NumPy arrays holds.

    A pickle is a program. Of all that it may call, only the reconstruction of arrays is known here,
    and that in our own words: names that would run are refused, sizes that lie never allocate.
    Raises InputError for any other pickle.
    """
    try:
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise InputError(f"{path} has {size} bytes: statistics have at most {MAX_BYTES}")
        return _finished(_Reader(BytesIO(Path(path).read_bytes())).load())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except InputError:
        raise
    except Exception as error:  # a broken pickle makes its reader raise anything
        raise InputError(
            f"{path} is no pickle of plain arrays ({type(error).__name__}: {error}); give "
            "statistics as .npz"
        ) from error


class _Token:
    """A name that arrays are written with and that nobody may call."""


class _Dtype:
    """A type of f32, f64 or integers, as `numpy.dtype(name)` and its state describe it."""

    def __init__(self, name: str, *_: Any):
        self.name, self.order = str(name), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = str(state[1]).replace("|", "=")

    def resolved(self) -> np.dtype:
        if self.name not in ("f4", "f8", "i4", "i8", "u1") or self.order not in ("<", ">", "="):
            raise ValueError(f"an array of type {self.order}{self.name}")
        return np.dtype(self.order + self.name)


class _Array:
    """An array to be: its bytes come with __setstate__."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _filled(data, dtype, shape, "F" if fortran else "C").array


def _filled(data: Any, dtype: Any, shape: Any, order: str = "C") -> _Array:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise ValueError("an array of objects")
    kind, shape = dtype.resolved(), tuple(int(n) for n in shape)
    if min(shape, default=0) < 0 or prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array {kind} {shape} of {len(data)} bytes")
    made = _Array()
    made.array = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
    return made


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> _Array:
    return _filled(data, dtype, ())


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


_KNOWN = {
    ("numpy", "ndarray"): _Token,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", name): stand_in
    for core in ("core", "_core")
    for module, name, stand_in in (
        ("multiarray", "_reconstruct", _reconstruct),
        ("multiarray", "scalar", _scalar),
        ("numeric", "_frombuffer", _filled),
    )
}


# The reader in Python, not that in C: it never allocates what it cannot read.
class _Reader(pickle._Unpickler):  # type: ignore[attr-defined]
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise InputError(
                f"a pickle that calls {module}.{name}: only NumPy arrays are read from pickles; "
                "give statistics as .npz"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("a reference to another file")

    def get_extension(self, code: int) -> Any:
        raise ValueError("an extension code")

    def load_build(self) -> None:
        # The usual way sets attributes of whatever stands there, of the stand-ins themselves too.
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) not in (_Array, _Dtype):
            raise ValueError(f"a state for a {type(target).__name__}")
        target.__setstate__(state)

    # Old pickles ask for constructors by opcode; those opcodes have no place in statistics.
    dispatch = {
        code: method
        for code, method in pickle._Unpickler.dispatch.items()  # type: ignore[attr-defined]
        if bytes([code]) not in (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX)
    } | {pickle.BUILD[0]: load_build}


def _finished(value: Any, depth: int = 2) -> Any:
    """The arrays of dicts within a dict; deeper, references could go round in rings."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, dict) and depth:
        return {k: _finished(v, depth - 1) for k, v in value.items()}
    return value
