"""Gradients of a step: of the whole batch at once, or summed over micro-batches of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.sharding import constrain

Batch = dict[str, jax.Array]
# (params, batch, step) -> the loss, a mean over the batch, and its parts or what else was seen
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]]

POSITION = "position"
"""The entry of a batch that says where in the global batch each row stands; draws depend on it."""


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

    def split(x):
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, {**batch, POSITION: positions(batch)})


def value_and_grad(
    loss: Loss, params: Any, batch: Batch, step: jax.Array, *, count: int, shardings: Any
) -> tuple[tuple[jax.Array, Any], Any]:
    """The loss, its parts and its gradient, over `count` micro-batches one after the other.

    Equal to those of the whole batch up to rounding: the loss, its gradient and its parts are means
    over the batch, parts whose name ends in "/sum" or "/count" are sums. The running sum of
    gradients is placed as `shardings` (of the parameters) says.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        return gradient(params, batch, step)

    def turn(total, micro):
        seen, grads = gradient(params, micro, step)
        total = jax.tree.map(jnp.add, total, grads)
        return jax.lax.with_sharding_constraint(total, shardings), seen

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings)
    total, (values, parts) = jax.lax.scan(turn, zeros, micro_batches(batch, count))
    parts = {n: x.sum(0) if n.endswith(("/sum", "/count")) else x.mean(0) for n, x in parts.items()}
    return (values.mean(), parts), jax.tree.map(lambda g: g / count, total)
