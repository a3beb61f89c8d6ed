"""A step whose loss or gradient is not finite leaves everything as it was but the step's number."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.train.state import TrainState


def keep_finite(
    old: TrainState, new: TrainState, *values: jax.Array
) -> tuple[TrainState, jax.Array]:
    """`new` where all `values` [] are finite, else `old` at new's step; and 1.0 if it was skipped.

    The step advances in any case, so that the data moves on.
    """
    finite = jnp.stack([jnp.isfinite(v) for v in values]).all()
    kept = jax.tree.map(lambda o, n: jnp.where(finite, n, o), old, new)
    return dataclasses.replace(kept, step=new.step), 1.0 - finite


def updates_done(opt_state: Any) -> jax.Array:
    """The optimizer's own count of updates, int32 []: skipped steps are not in it."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    assert counts, "the optimizer's state has no count"
    return counts[0][1]
