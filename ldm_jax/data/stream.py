"""The endless stream of batches; its position is the step, and nothing else is ever saved."""

import dataclasses
import sys
from collections.abc import Callable, Generator

import grain.python as grain
import numpy as np

from ldm_jax.data.order import Order
from ldm_jax.errors import divides, within

Batch = dict[str, np.ndarray]
Read = Callable[[np.ndarray, np.ndarray], Batch]  # (indices int64 [b], positions int64 [b])


@dataclasses.dataclass(frozen=True)
class _Steps:
    """grain's source: element s is this process's rows of the global batch of step s."""

    read: Read
    order: Order
    batch_size: int
    shard_index: int
    shard_count: int

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, step: int) -> Batch:
        rows = self.batch_size // self.shard_count
        first = int(step) * self.batch_size + self.shard_index * rows
        positions = np.arange(first, first + rows, dtype=np.int64)
        indices = self.order.examples(positions)
        return {**self.read(indices, positions), "index": indices}


def batches(
    read: Read,
    order: Order,
    batch_size: int,
    *,
    start_step: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Generator[Batch, None, None]:
    """Batches of host arrays from `start_step` on, for ever; `close()` ends the reading threads.

    The global batch of step s is the stream positions [s B, (s + 1) B). This process gets the
    contiguous rows [i B / n, (i + 1) B / n) of it, so that joining the processes' rows gives the
    same array for every n. "index" (int64 [b]) is added to what `read` returns.

    Raises InputError when the sizes do not fit, at once; what `read` raises reaches the consumer
    at the batch concerned.
    """
    within("shard_count", shard_count, "[1, inf)", "it is the number of processes that read")
    divides("batch_size", batch_size, shard_count, "the number of processes")
    within("shard_index", shard_index, f"[0, {shard_count})", "count processes from 0")
    within("start_step", start_step, "[0, inf)", "count steps from 0")
    within("num_threads", num_threads, "[0, inf)", "0 reads in the caller's thread")
    within("prefetch", prefetch, "[0, inf)", "0 reads a batch when it is wanted")
    steps = _Steps(read, order, batch_size, shard_index, shard_count)
    # grain's defaults (16 threads, 500 whole batches) would take gigabytes.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return _closing(grain.MapDataset.source(steps)[start_step:].to_iter_dataset(options))


def _closing(dataset: grain.IterDataset) -> Generator[Batch, None, None]:
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()
