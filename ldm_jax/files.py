"""Files of ours, written whole or not at all, their digests, and `.npz` files that others wrote.

Of another's `.npz` nothing is run and nothing is allocated on trust.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm_jax.errors import InputError

HEADER_BYTES = 4096  # of a .npy header; NumPy writes 128 for plain arrays


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, whose file takes its place once it is on disk.

    Until then, and where the block fails, the old file stays whole. Folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique over the hosts of a shared disk, and opened by name: a file with the usual permissions.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Fills `path` through `write(file)`, whole or not at all."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        write(file)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes `content`, whole or not at all."""
    write_atomically(path, lambda file: file.write(content))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any, indent: int = 2) -> None:
    """Writes `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def append_json(path: str | os.PathLike, content: Any) -> None:
    """Adds a line to a file of JSON lines; it is on disk when this returns. Folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def utc_now() -> str:
    """As records have it, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_npz(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes arrays by name, whole or not at all."""
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_json(path: Path, remedy: str = "put back a copy, or delete it") -> Any:
    """The content of a JSON file; InputError, with the remedy, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {remedy}") from error


def absolute(path: str) -> str:
    """The same place whatever the current folder; addresses, and "", stay as they are."""
    return path if not path or "://" in path else str(Path(path).absolute())


def sha256(path: str | os.PathLike) -> str:
    """Hex digest of a file; InputError where it cannot be read."""
    with _errors(path, "cannot be read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(content: str | bytes) -> str:
    """sha256 hex of bytes, or of a text as UTF-8."""
    return digest_of([content])


def digest_of(parts: Iterable[str | bytes]) -> str:
    """sha256 hex of parts one after the other, which need not all be in memory."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()


def digest_json(value: Any) -> str:
    """sha256 hex of a value as JSON with sorted names."""
    return digest(json.dumps(value, sort_keys=True))


def digest_arrays(arrays: Mapping[str, np.ndarray], header: str = "") -> str:
    """sha256 hex of a header and of names, types, shapes and values in the order of the names."""

    def parts() -> Iterator[str | bytes]:
        yield header
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            yield f"{name} {array.dtype.str} {array.shape}"
            yield array.tobytes()

    return digest_of(parts())


@dataclasses.dataclass(frozen=True)
class Header:
    """What the start of a member says, held against the member's size."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool


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
def _errors(path, what="is not a whole .npz file of plain arrays"):
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give a file") from None
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"{path} {what}: {error}") from error
