"""What both trainings share once they are built: the order of the data, hooks and the loop."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

from ldm_jax.data import stream
from ldm_jax.data.order import Order
from ldm_jax.runs.settings import Run
from ldm_jax.runs.workdir import write_record
from ldm_jax.sharding import process_slice
from ldm_jax.train import hooks as hooks_lib
from ldm_jax.train import loop
from ldm_jax.train.hooks import Hook
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Trainer


def fit(
    run: Run,
    workdir: Path,
    trainer: Trainer,
    read: stream.Read,
    order: Order,
    *,
    record: dict[str, Any],
    frozen: Any = None,
    start_from: tuple[Any, dict[str, Any]] | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainState:
    """Trains to `run.num_steps` in `workdir`, from its newest checkpoint when it has one.

    `read` gives a batch of host arrays for dataset indices [b] and stream positions [b], in the
    given `order`. `record` is `check_run`'s, written once nothing more is refused. `frozen` are the
    networks of `trainer.abstract_frozen`. `start_from` are parameters to begin with instead of
    random ones, and what is kept of the training that they are from (`Trainer.init_from`).
    """
    if jax.process_index() == 0:
        params = trainer.abstract_state.params
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        print(overview, file=sys.stderr)
    index, count = process_slice(run.batch_size, trainer.mesh)
    if run.ema.snapshot_every:
        # First: a later hook that fails must not leave a gap that no resume fills.
        hooks = [hooks_lib.snapshots(workdir, run.ema.snapshot_every), *hooks]

    def batches(start: int) -> loop.Batches:
        return stream.batches(
            read,
            order,
            run.batch_size,
            start_step=start,
            shard_index=index,
            shard_count=count,
            num_threads=run.data_threads,
        )

    frozen = jax.device_put(
        frozen or {}, jax.tree.map(lambda s: s.sharding, trainer.abstract_frozen)
    )
    return loop.train(
        run,
        trainer,
        frozen,
        batches,
        workdir=workdir,
        name=record["job"],
        on_start=functools.partial(write_record, workdir, record),
        start_from=start_from,
        hooks=hooks,
    )
