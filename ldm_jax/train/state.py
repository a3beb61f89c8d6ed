"""What a training run carries from step to step: data only; functions come by closure."""

import dataclasses
from collections.abc import Callable
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

    `extra` is what a training carries besides its model: the discriminator of a first stage with
    its optimizer, the counts of a codebook. Empty for most.
    """

    step: jax.Array  # int32 [], number of updates done
    params: Any
    ema: Any
    opt_state: Any
    extra: Any = dataclasses.field(default_factory=dict)


def init_state(
    init_params: Callable[[], Any],
    axes: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    with_ema: bool,
    init_extra: Callable[[Any], Any] | None = None,
    extra_axes: Any = (),
) -> tuple[TrainState, TrainState]:
    """A fresh state, made sharded on the mesh, and the tree of its shardings.

    `axes` has the structure of the parameters; optimizer moments and EMA take their shardings from
    it. `init_extra(params)` makes `extra`, whose shardings come from `extra_axes`. No device ever
    holds a whole copy of what the mesh shards.
    """

    def init() -> TrainState:
        with use_mesh(mesh):
            params = init_params()
        # A copy: the state is donated, and one buffer may not be donated twice.
        ema = jax.tree.map(jnp.copy, params) if with_ema else {}
        extra = init_extra(params) if init_extra else {}
        return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), extra)

    shapes = jax.eval_shape(init)
    shardings: Any = TrainState(
        replicated(mesh),  # type: ignore[arg-type]  shardings stand where arrays will
        param_shardings(axes, shapes.params, mesh),
        param_shardings(axes, shapes.ema, mesh) if with_ema else {},
        state_shardings(shapes.opt_state, axes, mesh),
        state_shardings(shapes.extra, extra_axes, mesh),
    )
    return jax.jit(init, out_shardings=shardings)(), shardings


def abstract_like(state: TrainState) -> TrainState:
    """Shapes, types and shardings of a state: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
