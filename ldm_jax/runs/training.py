"""What both trainings share: a fresh state, the compiled step, the order of the data, the loop."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from ldm_jax.data import stream
from ldm_jax.data.order import Order
from ldm_jax.errors import InputError
from ldm_jax.keys import key_for
from ldm_jax.runs.settings import Run, loop_config
from ldm_jax.sharding import process_slice
from ldm_jax.train import ema, loop
from ldm_jax.train.state import TrainState, init_state
from ldm_jax.train.steps import Step


def check_traces(compute: Callable[[jax.Array, Any], Any], batch: Any) -> None:
    """Traces compute(key, batch) on shapes alone: what can't run is refused before any work.

    Raises InputError with the reason.
    """
    try:
        jax.eval_shape(compute, jax.eval_shape(lambda: jax.random.key(0)), batch)
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
    optimizer: optax.GradientTransformation,
    make_step: Callable[[TrainState], Step],
    read: stream.Read,
    order: Order,
    init_extra: Callable[[Any], Any] | None = None,
    extra_axes: Any = (),
    train_extra: bool = False,
    start_from: Any = None,
    evaluate: loop.Evaluate | None = None,
) -> TrainState:
    """Trains to `run.num_steps` in `workdir`, from its newest checkpoint when it has one.

    `init` makes the parameters from a key and `axes` names their logical axes; `make_step` compiles
    the step for a tree of shardings; `read` gives a batch of host arrays for dataset indices [b]
    and stream positions [b], in the given `order`. `start_from` are parameters to begin with
    instead. `evaluate` is called every `run.eval_every` steps.
    """
    state, shardings = init_state(
        lambda: init(key_for(run.seed, "init")),
        axes,
        optimizer,
        mesh,
        with_ema=run.ema.decay > 0,
        averages=ema.average_names(run.ema),
        init_extra=init_extra,
        extra_axes=extra_axes,
        train_extra=train_extra,
    )
    if start_from is not None:
        copy = lambda p: jax.tree.map(jnp.copy, p)  # noqa: E731
        begin = jax.jit(
            lambda p: (
                copy(p),
                copy(p) if run.ema.decay else {},
                init_extra(p) if init_extra else {},
                {name: copy(p) for name in shardings.averages},
            ),
            out_shardings=(
                shardings.params,
                shardings.ema,
                shardings.extra,
                shardings.averages,
            ),
        )
        params, main, extra, averages = begin(start_from)
        state = dataclasses.replace(state, params=params, ema=main, extra=extra, averages=averages)
    if jax.process_index() == 0:
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        print(overview, file=sys.stderr)
    index, count = process_slice(run.batch_size, mesh)
    return loop.train(
        loop_config(run),
        workdir=workdir,
        name=name,
        state=state,
        step=make_step(shardings),
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
        evaluate=evaluate,
        snapshot_every=run.ema.snapshot_every,
    )
