"""The step of every training, one pure function (state, frozen, batch) -> (state, metrics).

A `Training` says what is trained, on which batches, by which loss and optimizer; `make_trainer`
makes of it, on a mesh, all that a loop, a plan or a benchmark needs, from shapes alone.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for
from ldm_jax.sharding import (
    batch_sharding,
    constrain,
    param_shardings,
    placed,
    replicated,
    state_shardings,
    use_mesh,
)
from ldm_jax.train import ema
from ldm_jax.train.state import TrainState

Batch = dict[str, jax.Array]

POSITION = "position"
"""The entry of a batch that says where in the global batch each row stands; draws depend on it."""


class Seen(NamedTuple):
    """What a loss gives beside its value."""

    # Means over the batch; those whose name ends in "/sum" or "/count" are sums.
    metrics: dict[str, jax.Array]
    arrays: dict[str, jax.Array]  # for `after_update`, of batches that are not taken in parts


Loss = Callable[[Any, dict[str, Any], Any, Batch, jax.Array], tuple[jax.Array, Seen]]
"""(trained, extra, frozen, batch, step) -> the loss, a mean over the batch, and what was seen."""


class Turn(NamedTuple):
    """What a training does beside the optimizer, from the old state alone."""

    extra: dict[str, Any]
    metrics: dict[str, jax.Array]
    judged: list[jax.Array]  # numbers [] that must be finite, or the step is skipped


TakeTurn = Callable[[TrainState, Seen], Turn]
AfterUpdate = Callable[[TrainState, Any, dict[str, Any], Seen], tuple[Any, dict[str, Any]]]
"""(old state, new parameters, new extra, what was seen) -> parameters and extra."""
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A training as functions of arrays; nothing in it is an array."""

    init: Callable[[jax.Array], Any]  # key -> parameters
    axes: Any  # logical axis names of each
    loss: Loss
    optimizer: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    average: ema.EmaConfig
    batch: dict[str, jax.ShapeDtypeStruct]  # the global batch
    seed: int = 0
    accumulate: int = 1  # micro-batches, one after the other, that a batch is taken in
    init_extra: Callable[[Any], dict[str, Any]] = lambda params: {}
    extra_axes: dict[str, Any] = dataclasses.field(default_factory=dict)
    trained_extra: tuple[str, ...] = ()  # names in `extra` that the optimizer has beside params
    take_turn: TakeTurn | None = None  # what else a step moves, from the old state
    after_update: AfterUpdate | None = None  # what follows the new parameters, before the averages
    frozen: Any = dataclasses.field(default_factory=dict)  # networks that are read, as shapes
    frozen_axes: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A training on a mesh. Abstract trees hold shapes, types and shardings, and no array."""

    mesh: Mesh
    abstract_state: TrainState
    abstract_frozen: Any  # never donated, never in a checkpoint
    batch_spec: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[], TrainState]  # a fresh state, made sharded
    # The same from given parameters and, by the names that they have in checkpoints, what is kept
    # of another training: its averages, its "optimizer".
    init_from: Callable[[Any, dict[str, Any]], TrainState]
    step: Step  # compiled at its first call; donates the state


def make_trainer(training: Training, mesh: Mesh) -> Trainer:
    """Compiles nothing yet; raises InputError where the model cannot be computed on the batch."""
    check_traces(training)

    def fresh() -> TrainState:
        with use_mesh(mesh):
            return start(training, training.init(key_for(training.seed, "init")))

    shapes = jax.eval_shape(fresh)
    extra_axes = training.extra_axes
    moved = {n: extra_axes[n] for n in training.trained_extra}
    shardings: Any = TrainState(
        replicated(mesh),  # type: ignore[arg-type]  shardings stand where arrays will
        param_shardings(training.axes, shapes.params, mesh),
        state_shardings(shapes.opt_state, {**training.axes, **moved}, mesh),
        {n: param_shardings(training.axes, tree, mesh) for n, tree in shapes.averages.items()},
        state_shardings(shapes.extra, extra_axes, mesh),
    )
    frozen = param_shardings(training.frozen_axes, training.frozen, mesh)
    batch = {name: batch_sharding(mesh) for name in training.batch}
    return Trainer(
        mesh=mesh,
        abstract_state=placed(shapes, shardings),
        abstract_frozen=placed(training.frozen, frozen),
        batch_spec=placed(training.batch, batch),
        init=jax.jit(fresh, out_shardings=shardings),
        init_from=jax.jit(
            lambda params, kept: start(training, params, kept), out_shardings=shardings
        ),
        step=jax.jit(
            make_step(training, mesh, shardings),
            donate_argnums=0,
            in_shardings=(shardings, frozen, batch_sharding(mesh)),
            out_shardings=(shardings, replicated(mesh)),
            compiler_options=compiler_options(mesh),
        ),
    )


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """Compiling a step on the CPU takes as long as dozens of steps, and its kernels gain nothing.

    What XLA_FLAGS say of it stays.
    """
    level = "xla_backend_optimization_level"
    cpu = mesh.devices.flat[0].platform == "cpu"
    return {level: 1} if cpu and level not in os.environ.get("XLA_FLAGS", "") else {}


def start(
    training: Training, params: Any, kept: Mapping[str, Any] = MappingProxyType({})
) -> TrainState:
    """The state before the first step; what is not `kept` begins anew."""

    # Copies: the state is donated, and one buffer may not be donated twice.
    def copy() -> Any:
        return jax.tree.map(jnp.copy, params)

    extra = training.init_extra(params)
    trained = {**params, **{n: extra[n] for n in training.trained_extra}}
    names = ema.average_names(training.average)
    averages = {name: kept[name] if name in kept else copy() for name in names}
    opt_state = kept["optimizer"] if "optimizer" in kept else training.optimizer.init(trained)
    return TrainState(jnp.zeros((), jnp.int32), copy(), opt_state, averages, extra)


def check_traces(training: Training) -> None:
    """Traces the loss on shapes alone: what cannot run is refused before any work."""

    def compute(key: jax.Array, frozen: Any, batch: Batch) -> Any:
        state = start(training, training.init(key))
        extra = {n: state.extra[n] for n in training.trained_extra}
        return training.loss({**state.params, **extra}, state.extra, frozen, batch, state.step)

    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        jax.eval_shape(compute, key, training.frozen, training.batch)
    except InputError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"config.model does not fit together: {reason}; check its sizes"
        ) from error


def make_step(training: Training, mesh: Mesh, shardings: TrainState) -> Step:
    """Gradient, update and averages of one step, not compiled.

    The gradient is taken in `accumulate` micro-batches, one after the other. Where the loss, the
    gradient or what else is judged is not finite, nothing changes but the step's number, and the
    metric `skipped` is 1.
    """
    names = training.trained_extra

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict]:
        trained = {**state.params, **{n: state.extra[n] for n in names}}

        def loss(trained: Any, batch: Batch) -> tuple[jax.Array, Seen]:
            return training.loss(trained, state.extra, frozen, batch, state.step)

        with use_mesh(mesh):
            (value, seen), grads = value_and_grad(
                loss,
                trained,
                batch,
                count=training.accumulate,
                shardings={**shardings.params, **{n: shardings.extra[n] for n in names}},
            )
            norm = optax.tree.norm(grads)
            turn = training.take_turn(state, seen) if training.take_turn else Turn({}, {}, [])
            rate = jnp.asarray(training.learning_rate(updates_done(state.opt_state)), jnp.float32)
            metrics = {"loss": value, **seen.metrics, "grad_norm": norm, "lr": rate}

            def update(state: TrainState) -> TrainState:
                trained: Any = {**state.params, **{n: state.extra[n] for n in names}}
                updates, opt_state = training.optimizer.update(
                    grads, state.opt_state, trained, norm=norm
                )
                trained = optax.apply_updates(trained, updates)
                params = {n: trained[n] for n in state.params}
                extra = {**state.extra, **turn.extra, **{n: trained[n] for n in names}}
                if training.after_update:
                    params, extra = training.after_update(state, params, extra, seen)
                n = state.step + 1
                averages = ema.advance(training.average, state.averages, params, n)
                return TrainState(n, params, opt_state, averages, extra)

            new, skipped = keep_finite(state, update, value, norm, *turn.judged)
            return new, metrics | turn.metrics | {"skipped": skipped}

    return step


def keep_finite(
    state: TrainState, update: Callable[[TrainState], TrainState], *values: jax.Array
) -> tuple[TrainState, jax.Array]:
    """`update(state)` where all `values` [] are finite, else `state`; and 1.0 if it was skipped.

    The step advances by one in any case, so that the data moves on. What `update` does is done only
    where it counts, in the donated buffers themselves: a choice between an old and a new state
    needs room for both, and a copy of what was not chosen.
    """
    finite = jnp.stack([jnp.isfinite(v) for v in values]).all()
    kept = jax.lax.cond(finite, update, lambda state: state, state)
    return dataclasses.replace(kept, step=state.step + 1), 1.0 - finite


def updates_done(opt_state: Any) -> jax.Array:
    """The optimizer's own count of updates, int32 []: skipped steps are not in it."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    assert counts, "the optimizer's state has no count"
    return counts[0][1]


def draw_keys(seed: int, purpose: str, step: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row [B], from its position in the global batch [B], whatever the mesh."""
    return example_keys(key_for(seed, purpose, step), rows)


def positions(batch: Batch) -> jax.Array:
    """Where in the global batch each row stands, int32 [B]: in order, unless `batch` says it."""
    if POSITION in batch:
        return batch[POSITION]
    return jnp.arange(jax.tree.leaves(batch)[0].shape[0])


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]: micro-batch i has the rows i, count + i, 2 count + i ...

    Rows lie on the devices in blocks, so with this stride every device keeps its own rows, and its
    share of every micro-batch. Rows carry their positions along.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, {**batch, POSITION: positions(batch)})


def value_and_grad(
    loss: Callable[[Any, Batch], tuple[jax.Array, Seen]],
    params: Any,
    batch: Batch,
    *,
    count: int,
    shardings: Any,
) -> tuple[tuple[jax.Array, Seen], Any]:
    """The loss, what was seen and the gradient, over `count` micro-batches one after the other.

    Equal to those of the whole batch up to rounding: the loss and its gradient are means over the
    batch. Of several micro-batches only the metrics are kept. The running sum of gradients is
    placed as `shardings` (of the parameters) says.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return gradient(params, batch)

    def turn(total: Any, micro: Batch) -> tuple[Any, Any]:
        (value, seen), grads = gradient(params, micro)
        total = jax.tree.map(jnp.add, total, grads)
        return jax.lax.with_sharding_constraint(total, shardings), (value, seen.metrics)

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings)
    total, (values, parts) = jax.lax.scan(turn, zeros, micro_batches(batch, count))
    parts = {n: x.sum(0) if n.endswith(("/sum", "/count")) else x.mean(0) for n, x in parts.items()}
    return (values.mean(), Seen(parts, {})), jax.tree.map(lambda g: g / count, total)
