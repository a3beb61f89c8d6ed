"""A step whose loss or gradient is not finite leaves everything as it was but the step's number."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.train.state import TrainState


def keep_finite(
    state: TrainState, update: Callable[[TrainState], TrainState], *values: jax.Array
) -> tuple[TrainState, jax.Array]:
    """`update(state)` where all `values` [] are finite, else `state`; and 1.0 if it was skipped.

    The step advances by one in any case, so that the data moves on. What `update` does is done only
    where it counts, in the donated buffers themselves: a choice between an old and a new state
    needs room for both, and a copy of what was not chosen.
    """

    def skip(state):
        return state

    finite = jnp.stack([jnp.isfinite(v) for v in values]).all()
    kept = jax.lax.cond(finite, update, skip, state)
    return dataclasses.replace(kept, step=state.step + 1), 1.0 - finite


def updates_done(opt_state: Any) -> jax.Array:
    """The optimizer's own count of updates, int32 []: skipped steps are not in it."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    assert counts, "the optimizer's state has no count"
    return counts[0][1]
