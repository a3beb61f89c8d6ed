"""Arrays out of `.npz` files that others wrote: nothing is run, nothing is allocated on trust."""

import contextlib
import dataclasses
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from math import prod

import numpy as np

from ldm_jax.errors import InputError

HEADER_BYTES = 4096  # of a .npy header; NumPy writes 128 for plain arrays


@dataclasses.dataclass(frozen=True)
class Header:
    """What the start of a member says, held against the member's size."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file; InputError where it is missing."""
    with _errors(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def headers(path: str | os.PathLike) -> dict[str, Header]:
    """Name -> header of every array; InputError where the file or a header is broken or lies."""
    with _errors(path), zipfile.ZipFile(path) as archive:
        out = {}
        for member in archive.infolist():
            with archive.open(member) as file:
                out[member.filename.removesuffix(".npy")] = _header(file, member)
        return out


def read_npz(path: str | os.PathLike, *names: str) -> dict[str, np.ndarray]:
    """The arrays called `names`, all of them without; InputError where one is missing or broken."""
    found = headers(path)
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"{path} has no array {missing[0]!r}; it has {sorted(found)}")
    out = {}
    with _errors(path), zipfile.ZipFile(path) as archive:
        for name in names or found:
            member = archive.getinfo(f"{name}.npy" if f"{name}.npy" in archive.namelist() else name)
            with archive.open(member) as file:
                out[name] = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # the end, where zipfile compares its checksum
    return out


def rows(
    path: str | os.PathLike, name: str, start: int, stop: int, size: int
) -> Iterator[np.ndarray]:
    """The rows [start, stop) of the array `name`, at most `size` at a time; one batch in memory.

    Rows before `start` are skipped by reading over them where the member is compressed.
    """
    header = headers(path).get(name)
    if header is None or header.fortran or not header.shape:
        raise InputError(f"{path}: {name!r} must be an array stored row by row (C order)")
    stop = min(stop, header.shape[0])
    row = prod(header.shape[1:]) * header.dtype.itemsize
    with _errors(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        _header(file, archive.getinfo(f"{name}.npy"))
        file.seek(start * row, os.SEEK_CUR)
        for at in range(start, stop, size):
            count = min(size, stop - at)
            data = file.read(count * row)
            if len(data) != count * row:
                raise EOFError(f"{name} ends in row {at + len(data) // max(row, 1)}")
            yield np.frombuffer(data, header.dtype).reshape(count, *header.shape[1:])
        if stop == header.shape[0]:
            file.read(1)  # the end, where zipfile compares its checksum


def _header(file, member: zipfile.ZipInfo) -> Header:
    """Reads the .npy header; the file then stands at the first byte of data."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{member.filename} has format version {version}")
    length = file.read(2 if version == (1, 0) else 4)
    count = int.from_bytes(length, "little")
    if count > HEADER_BYTES:
        raise ValueError(f"{member.filename} has a header of {count} bytes, over {HEADER_BYTES}")
    text = io.BytesIO(length + file.read(count))
    parse = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        parse = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(text)
    # A header may promise terabytes; numpy would allocate them before it misses the data.
    if dtype.hasobject or file.tell() + prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} does not hold the {dtype} {shape} its header names")
    return Header(shape, dtype, fortran)


@contextlib.contextmanager
def _errors(path):
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give a file") from None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"{path} is not a whole .npz file of plain arrays: {error}") from error
