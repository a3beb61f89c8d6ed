"""Sums of features in f64 and features kept on disk, over a run that may be killed at any time.

A folder holds, for each process, `partial-PPPPP-of-QQQQQ-POSITION.npz`, the sums up to there.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval import feature_store
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.images_out import write_atomically
from ldm_jax.eval.protocol import Protocol, difference
from ldm_jax.eval.statistics import Features, gather_exact, merge_hosts, own_rows
from ldm_jax.files import read_npz

BLOCK = 1024  # rows whose products are summed at a time, whatever the batches: the same bits
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
        self.rows = own_rows(protocol.num)
        self.longest = len(own_rows(protocol.num, 0, self.processes))
        self.position = 0  # samples asked of every process, up to `longest`
        self.kept = dict(kept)
        self.sums = {tap: Moments.empty(width) for tap, width in moments.items()}
        self.held = {tap: np.zeros((BLOCK, width), np.float32) for tap, width in moments.items()}
        self.filled = 0  # rows of `held`, which are in no sum yet
        self._thread = ThreadPoolExecutor(1)
        self._summing: Future[None] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_other(self.folder, feature_store.read_manifest(self.folder))
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
            feature_store.write(self._path(tap), self.position, features[tap])
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
            feature_store.sync(self._path(tap))
        header = {"protocol": self.protocol.to_json(), "position": self.position}
        arrays = {"header": np.array(json.dumps(header))}
        for tap, one in self.sums.items():
            arrays |= {f"{tap}/n": np.int64(one.count), f"{tap}/sum": one.total}
            arrays |= {f"{tap}/outer": one.outer, f"{tap}/held": self.held[tap][: self.filled]}
        path = self.folder / f"{self._stem}-{self.position:010d}.npz"
        write_atomically(path, lambda file: np.savez(file, **arrays))
        # Until all have this position, the one before is what they have in common.
        _wait_for_all(f"saved {self.position}")
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
        _wait_for_all("kept")
        if self.process == 0 and self.kept:
            content = {"protocol": self.protocol.to_json(), "processes": self.processes}
            feature_store.write_manifest(self.folder, {**content, "widths": self.kept})
        _wait_for_all("whole")  # else another process could look for them before
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
        return feature_store.path(self.folder, tap, self.process, self.processes)

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
            feature_store.remove_manifest(self.folder)  # they are whole no longer
        for tap, width in self.kept.items():
            if not latest:
                feature_store.create(self._path(tap), len(self.rows), width)
            elif feature_store.shape(self._path(tap)) != (len(self.rows), width):
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


def _longest(seconds: float) -> float:
    """The most of what all processes give: what they decide by it they decide alike."""
    return seconds if jax.process_count() == 1 else gather_exact(np.array([seconds])).max()


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
