"""Features f32 kept on disk in the order of the samples, a plain .npy for each process and tap.

`features-TAP-PPPPP-of-QQQQQ.npy` has its final size from the start; `features.json` says that all
of them are whole. Written as files, not as mapped memory: a full disk is then an error and no
signal that kills.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.images_out import write_atomically
from ldm_jax.eval.statistics import own_rows

MANIFEST = "features.json"


def read_features(folder: str | os.PathLike, tap: str) -> np.ndarray:
    """f32 [N, D] in the order of the samples; mapped from disk where one process wrote them.

    Raises InputError where the evaluation is unfinished or a file is missing.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if tap not in manifest.get("widths", {}):
        raise InputError(
            f"{folder} has no whole features {tap!r}; finish the evaluation, with {tap!r} kept"
        )
    processes, num = manifest["processes"], manifest["protocol"]["num"]
    parts = []
    for process in range(processes):
        part = path(folder, tap, process, processes)
        rows = len(own_rows(num, process, processes))
        if shape(part) != (rows, manifest["widths"][tap]):
            raise InputError(
                f"{part} is missing or is not {rows} rows of {manifest['widths'][tap]}; put all "
                "processes' files into one folder, or evaluate again"
            )
        if rows:
            parts.append(np.load(part, mmap_mode="r", allow_pickle=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def path(folder: Path, tap: str, process: int, processes: int) -> Path:
    return folder / f"features-{tap}-{process:05d}-of-{processes:05d}.npy"


def create(file: Path, rows: int, width: int) -> None:
    """A file of `rows` rows, all zeros and taking no space yet."""
    with file.open("wb") as out:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(out, header)
        out.truncate(out.tell() + 4 * rows * width)


def write(file: Path, start: int, features: np.ndarray) -> None:
    """Puts features [n, D] in the rows from `start` on."""
    with file.open("r+b") as out:
        rows, width = _header(out)[0]
        fits = not len(features) or (features.shape[1] == width and start + len(features) <= rows)
        assert fits, f"{features.shape} from row {start} on in {(rows, width)}"
        out.seek(4 * start * width, os.SEEK_CUR)
        out.write(np.ascontiguousarray(features, "<f4").tobytes())


def sync(file: Path) -> None:
    """Returns when what was written is on disk."""
    with file.open("r+b") as out:
        os.fsync(out.fileno())


def shape(file: Path) -> tuple[int, ...]:
    """What a file holds, by its header and its size; () where they disagree or it is missing."""
    try:
        with file.open("rb") as opened:
            found, fortran, dtype = _header(opened)
            whole = file.stat().st_size == opened.tell() + 4 * int(np.prod(found))
            return found if whole and dtype == np.dtype("<f4") and not fortran else ()
    except (OSError, ValueError):
        return ()


def _header(opened):
    np.lib.format.read_magic(opened)
    return np.lib.format.read_array_header_1_0(opened)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Protocol, number of processes and widths of finished features; empty where there are none."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(
            f"{folder / MANIFEST} is damaged ({error}); delete the folder and evaluate again"
        ) from error


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def remove_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
