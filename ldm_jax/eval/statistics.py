"""Features of images by a network over a mesh, and sums over hosts: the same whatever the mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ldm_jax.eval.frechet import Moments
from ldm_jax.sharding import RULES, batch_shards, process_slice, put_batch

Features = dict[str, np.ndarray]  # tap -> f32 [n, D]
GATHER_WORDS = 1 << 20  # a host gets so many uint32 words of every other one at a time


def process_rows(num: int, process: int | None = None, processes: int | None = None) -> range:
    """The samples [0, num) that this process measures: one contiguous part, the last ones shorter.

    Without arguments, of this process among those that jax.distributed joined.
    """
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    size = -(-num // processes)
    return range(min(process * size, num), min((process + 1) * size, num))


def rows_per_process(size: int, mesh: Mesh) -> int:
    """This process's share of a batch of `size` rows over the mesh."""
    return size // process_slice(size, mesh)[1]


def over_local_rows(function: Callable[[Any], Any], rows: Any, mesh: Mesh, size: int) -> Any:
    """A function of batch-sharded arrays [size, ...] of this process's `rows` [n, ...] of them.

    Gives its results for these rows, host arrays [n, ...]. What is missing in the share of the
    process is filled up with zeros. On a mesh over several processes all must call equally often,
    with no rows at the end perhaps.
    """
    num, share = len(jax.tree.leaves(rows)[0]), rows_per_process(size, mesh)
    assert num <= share, f"{num} rows for {share}"

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, share - num)] + [(0, 0)] * (np.ndim(x) - 1))

    out = function(put_batch(jax.tree.map(padded, rows), mesh, size))
    return jax.tree.map(lambda x: _local(x)[:num], out)


def _local(x: jax.Array) -> np.ndarray:
    """The rows of a batch-sharded array that this process holds, in order, each once."""
    parts = {s.index[0].start or 0: s.data for s in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def compile_features(
    network: Callable[[Any, jax.Array], Mapping[str, jax.Array]], mesh: Mesh, block: int
) -> tuple[Callable[[Any, np.ndarray], Features], int]:
    """(measure, rows): measure(params, x [n, ...]) -> {tap: f32 [n, D]} of this process's rows.

    `rows` is the most that this process can measure in one call, see `over_local_rows`. The network
    sees blocks of exactly `block` rows, each whole on one device, so the bits of a feature do not
    depend on how many devices there are. Parameters are whole on every device.
    """
    axes, size = RULES["batch"], block * batch_shards(mesh)

    def forward(params, x):
        with jax.default_matmul_precision("highest"):
            return jax.tree.map(lambda f: f.astype(jnp.float32), dict(network(params, x)))

    sharded = jax.shard_map(
        forward, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P(axes), check_vma=False
    )
    compiled = jax.jit(sharded)

    def measure(params: Any, x: np.ndarray) -> Features:
        return over_local_rows(functools.partial(compiled, params), x, mesh, size)

    return measure, rows_per_process(size, mesh)


def merge_hosts(moments: Moments) -> Moments:
    """The sum over all processes, in their order, so every one gets the same bits.

    All must call it. f64 crosses as words: process_allgather would round it to f32 silently.
    """
    if jax.process_count() == 1:
        return moments
    counts = gather_exact(np.array([moments.count], np.float64)).astype(np.int64)
    total, outer = gather_sum(moments.total), gather_sum(moments.outer)
    return Moments(int(counts.sum()), total, outer)


def gather_sum(x: np.ndarray) -> np.ndarray:
    """The f64 sum of each process's array, added in the order of the processes."""
    flat = np.ascontiguousarray(x, np.float64).ravel()
    out = np.empty_like(flat)
    step = GATHER_WORDS // 2
    for start in range(0, flat.size, step):
        parts = gather_exact(flat[start : start + step])
        out[start : start + step] = parts[0]
        for part in parts[1:]:
            out[start : start + step] += part
    return out.reshape(np.shape(x))


def gather_exact(x: np.ndarray) -> np.ndarray:
    """f64 [n] of every process as [processes, n], bit for bit; every process must call it."""
    from jax.experimental import multihost_utils

    words = np.ascontiguousarray(x, np.float64).view(np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(words, tiled=False))
    return np.ascontiguousarray(gathered, np.uint32).reshape(-1, words.size).view(np.float64)
