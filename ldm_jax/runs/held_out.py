"""The denoising loss of held-out latents on draws that never change, while a denoiser trains."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from zlib import crc32

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.data.records.reader import LatentCache
from ldm_jax.errors import InputError
from ldm_jax.models import conditions
from ldm_jax.runs.build import LatentFacts, denoising_of
from ldm_jax.runs.reconstruction import spread
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import batch_sharding, fitting_batch, over_batches, use_mesh
from ldm_jax.train.denoiser import INDEX, PerExample, bin_of, per_example
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import POSITION

SEED = crc32(b"eval")
"""Of the draws: that of no run, so that runs of different seeds are judged on the same noise."""

Measure = Callable[[Any], tuple[np.ndarray, np.ndarray]]


def compile_losses(
    losses: PerExample, batch: dict[str, np.ndarray], indices: np.ndarray, mesh: Mesh, size: int
) -> Measure:
    """params -> (losses, times), f32 [N] each, of the examples `indices` [N], the rows of `batch`.

    `size` rows at a time, rounded up to the mesh. An example's draws come from its index alone.
    Every process must call it, and gets all of them.
    """
    batch, size = {**batch, POSITION: indices.astype(np.int32)}, fitting_batch(size, mesh)

    def forward(params, rows):
        with use_mesh(mesh):
            examples = losses(params, {}, rows, 0)
            return examples.loss, examples.times

    forward = jax.jit(forward, out_shardings=batch_sharding(mesh))
    return lambda params: over_batches(functools.partial(forward, params), batch, mesh, size)


def hook(config: DenoiserRun, facts: LatentFacts, mesh: Mesh, cache: LatentCache) -> Hook:
    """Every `eval_every` steps the held-out `loss`, and with `loss_bins` that by time.

    Of the averaged weights, or the raw ones without an average, on `eval_examples` spread over a
    held-out `cache`; conditions are kept.
    """
    if not len(cache):
        raise InputError(
            f"latent cache {cache.directory} is empty; set --config.eval_every=0, or hold images "
            "out when the first stage is trained"
        )
    kept = dataclasses.replace(config.loss, condition_dropout=0.0)
    denoising = dataclasses.replace(denoising_of(config, facts), loss=kept, seed=SEED)
    losses = per_example(denoising)
    indices = spread(len(cache), config.eval_examples)
    rows = cache.read(indices, indices) | {"position": indices}
    batch = {"moments": rows["moments"], **conditions.read(config.model.conditions, rows)}
    if denoising.codec.draws == "example":
        batch[INDEX] = indices.astype(np.int32)
    size = min(max(1, config.batch_size // config.accumulate), len(indices))
    measure = compile_losses(losses, batch, indices, mesh, size)

    def evaluate(state: TrainState, step: int) -> Report:
        value, times = measure(state.weights)
        figures = {"loss": float(value.mean(dtype=np.float64))}
        if config.loss_bins:
            bins = np.asarray(bin_of(times, config.loss_bins))
            for k in np.unique(bins):
                figures[f"loss_bin/{k}"] = float(value[bins == k].mean(dtype=np.float64))
        return Report(figures)

    names = ("loss", *(f"loss_bin/{k}" for k in range(config.loss_bins)))
    return Hook(config.eval_every, evaluate, figures=names)
