"""The order of examples: a pure function from a position in the endless stream to an example.

Restarting, or reading on another number of hosts, only evaluates the function elsewhere.
"""

import dataclasses
import functools

import numpy as np

from ldm_jax.data import draws
from ldm_jax.errors import within


@dataclasses.dataclass(frozen=True)
class Order:
    """Every epoch is a permutation of the data set, and each epoch has another one.

    With block > 1 the stored records are permuted, then the examples inside each window of
    `window` consecutive records of that permutation, so that a reader touches few records at a
    time. Memory: 4 bytes per record while an epoch lasts; the windows' permutations come and go.
    """

    num_examples: int
    seed: int
    block: int = 1  # examples in a stored record; the last record may hold fewer
    window: int = 64  # records whose examples are shuffled together

    def __post_init__(self):
        for field in ("num_examples", "block", "window"):
            within(f"data order: {field}", getattr(self, field), "[1, inf)")

    def examples(self, positions: np.ndarray) -> np.ndarray:
        """Data set indices int64 [b] of the stream positions int64 [b], counted from 0."""
        positions = np.asarray(positions, np.int64)
        epochs, places = np.divmod(positions, self.num_examples)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            out[rows] = self._in_epoch(int(epoch), places[rows])
        return out

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        num_records = -(-self.num_examples // self.block)
        records = _records(self.seed, epoch, num_records)
        if self.block == 1:
            return records[places].astype(np.int64)
        missing = num_records * self.block - self.num_examples  # of the short record, R - 1
        short = _short_slot(self.seed, epoch, num_records)
        size = self.window * self.block
        # Places behind the window that holds the short record are `missing` too small.
        late = places >= (short // self.window + 1) * size - missing
        windows = (places + late * missing) // size
        out = np.empty_like(places)
        for w in np.unique(windows):
            rows = windows == w
            first = int(w) * self.window
            count = min(self.window, num_records - first) * self.block
            start, tail = int(w) * size, self.num_examples
            if first <= short < first + self.window:
                count -= missing
                tail = (short - first + 1) * self.block - missing
            elif short < first:
                start -= missing
            local = _inside(self.seed, epoch, int(w), count)[places[rows] - start].astype(np.int64)
            local += (local >= tail) * missing
            out[rows] = records[first + local // self.block].astype(np.int64) * self.block
            out[rows] += local % self.block
        return out


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _records(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return draws.permutation(seed, "record order", (epoch, 0), num_records)


@functools.lru_cache(maxsize=8)
def _short_slot(seed: int, epoch: int, num_records: int) -> int:
    return int(np.argmax(_records(seed, epoch, num_records) == num_records - 1))


@functools.lru_cache(maxsize=256)
def _inside(seed: int, epoch: int, window: int, count: int) -> np.ndarray:
    return draws.permutation(seed, "order inside a window", (epoch, window), count)
