"""What both trainings share: a fresh state, the compiled step, the order of the data, the loop."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from ldm_jax.data import stream
from ldm_jax.data.order import Order
from ldm_jax.errors import InputError
from ldm_jax.jobs.settings import Run, loop_config
from ldm_jax.keys import key_for
from ldm_jax.sharding import process_slice
from ldm_jax.train import loop, optim
from ldm_jax.train.state import TrainState, init_state
from ldm_jax.train.steps import Loss, make_step


def check_traces(loss: Loss, init: Callable[[jax.Array], Any], batch: Any) -> None:
    """Traces the loss on shapes alone, so that a model that can't run is refused before anything.

    Raises InputError with the reason.
    """
    try:
        key = jax.eval_shape(lambda: jax.random.key(0))
        jax.eval_shape(lambda k, b: loss(init(k), b, 0), key, batch)
    except InputError:
        raise
    except (TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"config.model does not fit together: {reason}; check its sizes"
        ) from error


def fit(
    name: str,
    run: Run,
    workdir: Path,
    mesh: Mesh,
    *,
    init: Callable[[jax.Array], Any],
    axes: Any,
    loss: Loss,
    read: stream.Read,
    order: Order,
) -> TrainState:
    """Trains to `run.num_steps` in `workdir`, from its newest checkpoint when it has one.

    `init` makes the parameters from a key and `axes` names their logical axes; `read` gives a
    batch of host arrays for dataset indices [b] and stream positions [b], in the given `order`.
    """
    optimizer = optim.make_optimizer(run.optim, run.num_steps)
    state, shardings = init_state(
        lambda: init(key_for(run.seed, "init")), axes, optimizer, mesh, with_ema=run.ema.decay > 0
    )
    if jax.process_index() == 0:
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        print(overview, file=sys.stderr)
    learning_rate = optim.learning_rate(run.optim, run.num_steps)
    index, count = process_slice(run.batch_size, mesh)
    return loop.train(
        loop_config(run),
        workdir=workdir,
        name=name,
        state=state,
        step=make_step(loss, optimizer, learning_rate, run.ema, mesh, shardings),
        batches=lambda start: stream.batches(
            read,
            order,
            run.batch_size,
            start_step=start,
            shard_index=index,
            shard_count=count,
            num_threads=run.data_threads,
        ),
        batch_size=run.batch_size,
        mesh=mesh,
    )
