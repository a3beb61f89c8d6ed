"""What a training run carries from step to step: data only; functions come by closure."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax.sharding import param_shardings, replicated, state_shardings, use_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything is f32 except `step`; `ema` is an empty dict when no average is kept.

    `averages` are those beside it, by name (train/ema.py).
    `extra` is what a training carries besides its model: the discriminator of a first stage with
    its optimizer, the counts of a codebook, an uncertainty. Empty for most.
    """

    step: jax.Array  # int32 [], number of updates done
    params: Any
    ema: Any
    opt_state: Any
    extra: Any = dataclasses.field(default_factory=dict)
    averages: dict[str, Any] = dataclasses.field(default_factory=dict)


def init_state(
    init_params: Callable[[], Any],
    axes: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    with_ema: bool,
    averages: Sequence[str] = (),
    init_extra: Callable[[Any], Any] | None = None,
    extra_axes: Any = (),
    train_extra: bool = False,
) -> tuple[TrainState, TrainState]:
    """A fresh state, made sharded on the mesh, and the tree of its shardings.

    `axes` has the structure of the parameters; optimizer moments and averages take their shardings
    from it. `averages` names those beside the main one. `init_extra(params)` makes `extra`, whose
    shardings come from `extra_axes`; with `train_extra` the optimizer, too, sees both in one tree.
    No device ever holds a whole copy of what the mesh shards.
    """

    def init() -> TrainState:
        with use_mesh(mesh):
            params = init_params()
        extra = init_extra(params) if init_extra else {}
        # Copies: the state is donated, and one buffer may not be donated twice.
        copy = lambda: jax.tree.map(jnp.copy, params)  # noqa: E731
        step, main = jnp.zeros((), jnp.int32), copy() if with_ema else {}
        others = {name: copy() for name in averages}
        trained = {**params, **extra} if train_extra else params
        return TrainState(step, params, main, optimizer.init(trained), extra, others)

    shapes = jax.eval_shape(init)
    shardings: Any = TrainState(
        replicated(mesh),  # type: ignore[arg-type]  shardings stand where arrays will
        param_shardings(axes, shapes.params, mesh),
        param_shardings(axes, shapes.ema, mesh) if with_ema else {},
        state_shardings(shapes.opt_state, {**axes, **extra_axes} if train_extra else axes, mesh),
        state_shardings(shapes.extra, extra_axes, mesh),
        {name: param_shardings(axes, tree, mesh) for name, tree in shapes.averages.items()},
    )
    return jax.jit(init, out_shardings=shardings)(), shardings


def abstract_like(state: TrainState) -> TrainState:
    """Shapes, types and shardings of a state: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
