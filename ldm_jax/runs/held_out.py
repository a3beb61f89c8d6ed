"""The denoising loss of held-out latents on draws that never change, while a denoiser trains."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.records.reader import LatentCache
from ldm_jax.errors import InputError
from ldm_jax.runs.reconstruction import spread
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import batch_sharding, host_array, process_slice, put_batch, use_mesh
from ldm_jax.train.gradient import POSITION
from ldm_jax.train.loop import Evaluate
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import PerExample, bin_of

SEED = crc32(b"eval")
"""Of the draws: no run's own, so that runs of different seeds are judged on the same noise."""

Measure = Callable[[Any], tuple[np.ndarray, np.ndarray]]


def compile_losses(
    losses: PerExample, batch: dict[str, np.ndarray], indices: np.ndarray, mesh: Mesh, size: int
) -> Measure:
    """params -> (losses, times), f32 [N] each, of the examples `indices` [N], whose rows are given.

    `size` rows at a time, rounded up to the mesh. An example's draws come from its index alone.
    Every process must call it, and gets all of them.
    """

    def forward(params, rows):
        with use_mesh(mesh):
            return losses(params, rows, 0)

    forward = jax.jit(forward, out_shardings=batch_sharding(mesh))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-size // ways) * ways
    shard, count = process_slice(size, mesh)
    own = np.arange(size).reshape(count, -1)[shard]
    batch = {**batch, POSITION: indices.astype(np.int32)}

    def measure(params):
        out = []
        for start in range(0, len(indices), size):
            # The last batch is filled up with copies.
            rows = np.minimum(start + own, len(indices) - 1)
            part = put_batch({name: x[rows] for name, x in batch.items()}, mesh, size)
            out.append([host_array(x) for x in forward(params, part)])
        value, times = (np.concatenate(x)[: len(indices)] for x in zip(*out, strict=True))
        return value, times

    return measure


def make_evaluation(
    config: DenoiserRun, mesh: Mesh, cache: LatentCache, names: set[str], losses: PerExample
) -> Evaluate:
    """What `loop.train` calls every `eval_every` steps: `loss`, and with `loss_bins` that by time.

    Of the averaged weights, or the raw ones without an average, on `eval_examples` spread over a
    held-out `cache`; `names` are the entries of a batch that `losses` wants, conditions are kept.
    """
    if not len(cache):
        raise InputError(
            f"latent cache {cache.directory} is empty; set --config.eval_every=0, or hold images "
            "out when the first stage is trained"
        )
    indices = spread(len(cache), config.eval_examples)
    rows = cache.read(indices, indices)
    size = min(max(1, config.batch_size // config.accumulate), len(indices))
    measure = compile_losses(losses, {n: rows[n] for n in names}, indices, mesh, size)

    def evaluate(state: TrainState, step: int):
        value, times = measure(state.ema or state.params)
        figures = {"loss": float(value.mean(dtype=np.float64))}
        if config.loss_bins:
            bins = np.asarray(bin_of(times, config.loss_bins))
            for k in np.unique(bins):
                figures[f"loss_bin/{k}"] = float(value[bins == k].mean(dtype=np.float64))
        return figures, {}

    return evaluate
