"""Sums of features in f64 and features kept on disk, over a run that may be killed at any time.

A folder holds, for each process, `partial-PPPPP-of-QQQQQ-POSITION.npz`, the sums up to there, and
for each tap that is kept `features-TAP-PPPPP-of-QQQQQ.npy`, f32 in the order of the samples, which
has its final size from the start; `features.json` says that all of those are whole. Features are
written as files, not as mapped memory: a full disk is then an error and no signal that kills.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.protocol import Protocol, difference
from ldm_jax.eval.statistics import Features, gather_exact, merge_hosts, process_rows
from ldm_jax.files import read_json, read_npz, write_json, write_npz
from ldm_jax.sharding import wait_for_all

BLOCK = 1024  # rows whose products are summed at a time, whatever the batches: the same bits
MANIFEST = "features.json"
REMEDY = "go on with the settings it was begun with, or delete the folder to begin anew"


class Accumulator:
    """The statistics of this process's samples, resumed from `folder` where it was at work before.

    `moments` and `kept` name taps and their widths. A thread sums each block, while the network has
    the next images. Raises InputError where the folder holds an evaluation by another protocol, of
    other taps or by another number of processes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        protocol: Protocol,
        *,
        moments: Mapping[str, int],
        kept: Mapping[str, int],
    ):
        self.folder, self.protocol = Path(folder), protocol
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.rows = process_rows(protocol.num)
        self.longest = len(process_rows(protocol.num, 0, self.processes))
        self.position = 0  # samples asked of every process, up to `longest`
        self.kept = dict(kept)
        self.sums = {tap: Moments.empty(width) for tap, width in moments.items()}
        self.held = {tap: np.zeros((BLOCK, width), np.float32) for tap, width in moments.items()}
        self.filled = 0  # rows of `held`, which are in no sum yet
        self._thread = ThreadPoolExecutor(1)
        self._summing: Future[None] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_other(self.folder, read_manifest(self.folder))
        self._resume()

    def indices(self, rows: int) -> np.ndarray:
        """The next samples of this process, at most `rows`; none where its part is done already."""
        start = self.rows.start + self.position
        return np.arange(start, max(start, min(start + rows, self.rows.stop)))

    def add(self, features: Features, rows: int) -> None:
        """Takes the features of `indices(rows)`; InputError where a row is not finite."""
        want = {**{t: h.shape[1] for t, h in self.held.items()}, **self.kept}
        count = len(self.indices(rows))
        for tap, width in want.items():
            f = features[tap]
            assert f.shape == (count, width), f"{tap}: {f.shape} for {(count, width)}"
            if not np.isfinite(f).all():
                bad = int(np.argmin(np.isfinite(f).all(1))) + self.rows.start + self.position
                raise InputError(
                    f"features {tap!r} of image {bad} are not finite; look at the image and at the "
                    "network's weights"
                )
        for tap in self.kept:
            _write_rows(self._path(tap), self.position, features[tap])
        start = 0
        while start < count:
            stop = min(start + BLOCK - self.filled, count)
            filled = self.filled + stop - start
            for tap, held in self.held.items():
                held[self.filled : filled] = features[tap][start:stop]
            start, self.filled = stop, filled
            if filled == BLOCK:
                self._settle()
                self._summing = self._thread.submit(self._sum, self.held)
                self.held = {tap: np.empty_like(held) for tap, held in self.held.items()}
                self.filled = 0
        self.position = min(self.position + rows, self.longest)

    def save(self) -> None:
        """Puts everything so far on disk; every process must call it at the same position."""
        self._settle()
        for tap in self.kept:
            _sync(self._path(tap))
        header = {"protocol": self.protocol.to_json(), "position": self.position}
        arrays = {"header": np.array(json.dumps(header))}
        for tap, one in self.sums.items():
            arrays |= {f"{tap}/n": np.int64(one.count), f"{tap}/sum": one.total}
            arrays |= {f"{tap}/outer": one.outer, f"{tap}/held": self.held[tap][: self.filled]}
        path = self.folder / f"{self._stem}-{self.position:010d}.npz"
        write_npz(path, arrays)
        # Until all have this position, the one before is what they have in common.
        wait_for_all(f"saved {self.position}")
        for position, old in self._saved().items():
            if position != self.position:
                old.unlink()

    def finish(self) -> dict[str, Moments]:
        """The sums over all processes, each of exactly `num` samples, and the kept files whole."""
        self._settle()
        out = {}
        for tap, one in self.sums.items():
            if self.filled:
                one = one.add(self.held[tap][: self.filled])
            out[tap] = merge_hosts(one)
            assert out[tap].count == self.protocol.num, f"{tap}: {out[tap].count} of all samples"
        assert self.position == self.longest, f"{self.position} of {self.longest} samples"
        wait_for_all("kept")
        if self.process == 0 and self.kept:
            content = {"protocol": self.protocol.to_json(), "processes": self.processes}
            write_json(self.folder / MANIFEST, {**content, "widths": self.kept}, indent=1)
        wait_for_all("whole")  # else another process could look for them before
        return out

    def discard(self) -> None:
        """Removes this process's sums, when the figures are safe; the kept features stay."""
        for path in self._saved().values():
            path.unlink()

    def _sum(self, blocks: Features) -> None:
        for tap, block in blocks.items():
            self.sums[tap] = self.sums[tap].add(block)

    def _settle(self) -> None:
        """Returns when every whole block is in the sums."""
        if self._summing:
            self._summing.result()

    @property
    def _stem(self) -> str:
        return f"partial-{self.process:05d}-of-{self.processes:05d}"

    def _path(self, tap: str) -> Path:
        return _features_path(self.folder, tap, self.process, self.processes)

    def _saved(self) -> dict[int, Path]:
        paths = self.folder.glob(f"{self._stem}-*.npz")
        return {int(path.stem.rpartition("-")[2]): path for path in sorted(paths)}

    def _resume(self) -> None:
        strangers = sorted({*self.folder.glob("partial-*.npz")} - {*self._saved().values()})
        strangers = [p for p in strangers if f"-of-{self.processes:05d}-" not in p.name]
        if strangers:
            raise InputError(f"{strangers[0]} is of another number of processes; {REMEDY}")
        for torn in self.folder.glob(f".{self._stem}-*.part"):  # of a save that was killed
            torn.unlink()
        saved = self._saved()
        latest = max(saved, default=0)
        if self.processes > 1:
            latest = int(gather_exact(np.array([latest], np.float64)).min())
        if latest:
            if latest not in saved:
                raise InputError(f"{self.folder} lacks {self._stem}-{latest:010d}.npz; {REMEDY}")
            self._load(saved[latest])
        if self.position < self.longest and self.process == 0:
            (self.folder / MANIFEST).unlink(missing_ok=True)  # they are whole no longer
        for tap, width in self.kept.items():
            if not latest:
                _create(self._path(tap), len(self.rows), width)
            elif _shape(self._path(tap)) != (len(self.rows), width):
                raise InputError(f"{self._path(tap)} is missing or damaged; {REMEDY}")

    def _load(self, path: Path) -> None:
        arrays = read_npz(path)
        header = json.loads(str(arrays.pop("header")))
        self._refuse_other(path, header)
        names = {f"{tap}/{part}" for tap in self.sums for part in ("n", "sum", "outer", "held")}
        if {*arrays} != names:
            raise InputError(
                f"{path} has sums of {sorted(arrays)}, not of {sorted(names)}; {REMEDY}"
            )
        for tap, one in self.sums.items():
            n, total, outer, held = (arrays[f"{tap}/{p}"] for p in ("n", "sum", "outer", "held"))
            if total.shape != one.total.shape or held.shape[1:] != one.total.shape:
                raise InputError(f"{path}: {tap!r} has {total.size} features; {REMEDY}")
            self.sums[tap], self.filled = Moments(int(n), total, outer), len(held)
            self.held[tap][: self.filled] = held
        self.position = header["position"]

    def _refuse_other(self, path: Path, header: dict) -> None:
        reason = difference(header.get("protocol"), self.protocol) if header else ""
        if reason:
            raise InputError(f"{path} is of another evaluation: {reason}; {REMEDY}")


def accumulate(
    folder: str | os.PathLike,
    protocol: Protocol,
    measure: Callable[[np.ndarray], Features],
    rows: int,
    *,
    moments: Mapping[str, int],
    kept: Mapping[str, int],
    save_every: int = 20,
    save_seconds: float = 60.0,
) -> tuple[dict[str, Moments], Accumulator]:
    """Measures all `protocol.num` samples, `rows` of this process a call, and saves now and then.

    measure(indices int64 [n <= rows]) -> {tap: f32 [n, D]}, of consecutive samples; every process
    calls it equally often, at the end perhaps with none. What was measured before a kill is not
    measured again, and the sums come out bit for bit as if it had not happened. Saves come after
    multiples of `save_every` calls, `save_seconds` or more apart: an accelerator measures hundreds
    of images while one is written. Call `discard()` on the accumulator once the figures are safe.
    """
    state = Accumulator(folder, protocol, moments=moments, kept=kept)
    calls, saved = 0, time.monotonic()
    while state.position < state.longest:
        state.add(measure(state.indices(rows)), rows)
        calls += 1
        due = calls % save_every == 0 and _longest(time.monotonic() - saved) >= save_seconds
        if due or state.position == state.longest:
            state.save()
            saved = time.monotonic()
    return state.finish(), state


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
        path = _features_path(folder, tap, process, processes)
        rows = len(process_rows(num, process, processes))
        if _shape(path) != (rows, manifest["widths"][tap]):
            raise InputError(
                f"{path} is missing or is not {rows} rows of {manifest['widths'][tap]}; put all "
                "processes' files into one folder, or evaluate again"
            )
        if rows:
            parts.append(np.load(path, mmap_mode="r", allow_pickle=False))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Protocol, number of processes and widths of finished features; empty where there are none."""
    path = folder / MANIFEST
    return read_json(path, "delete the folder and evaluate again") if path.exists() else {}


def _features_path(folder: Path, tap: str, process: int, processes: int) -> Path:
    return folder / f"features-{tap}-{process:05d}-of-{processes:05d}.npy"


def _create(path: Path, rows: int, width: int) -> None:
    """A file of `rows` rows, all zeros and taking no space yet."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 4 * rows * width)


def _write_rows(path: Path, start: int, features: np.ndarray) -> None:
    """Puts features [n, D] in the rows from `start` on."""
    with path.open("r+b") as file:
        rows, width = _read_header(file)[0]
        fits = not len(features) or (features.shape[1] == width and start + len(features) <= rows)
        assert fits, f"{features.shape} from row {start} on in {(rows, width)}"
        file.seek(4 * start * width, os.SEEK_CUR)
        file.write(np.ascontiguousarray(features, "<f4").tobytes())


def _sync(path: Path) -> None:
    """Returns when what was written is on disk."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _shape(path: Path) -> tuple[int, ...]:
    """What a file holds, by its header and its size; () where they disagree or it is missing."""
    try:
        with path.open("rb") as file:
            shape, fortran, dtype = _read_header(file)
            whole = path.stat().st_size == file.tell() + 4 * int(np.prod(shape))
            return shape if whole and dtype == np.dtype("<f4") and not fortran else ()
    except (OSError, ValueError):
        return ()


def _read_header(file):
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def _longest(seconds: float) -> float:
    """The most of what all processes give: what they decide by it they decide alike."""
    return seconds if jax.process_count() == 1 else gather_exact(np.array([seconds])).max()
