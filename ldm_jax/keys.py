"""Named randomness: every random draw of the project is a function of (seed, purpose, step)."""

from zlib import crc32

import jax
import jax.numpy as jnp


def key_for(seed: int | jax.Array, purpose: str, step: int | jax.Array = 0) -> jax.Array:
    """The key for one purpose at one step; `seed` and `step` may be traced."""
    return jax.random.fold_in(
        jax.random.fold_in(jax.random.key(seed), crc32(purpose.encode())), step
    )


def example_keys(key: jax.Array, indices: jax.Array) -> jax.Array:
    """One key per example, [B], from each example's global index.

    The draw of an example then depends neither on the batch it stands in nor on the device or the
    host that computes it.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)


def normal_like(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal f32 noise of x's shape [B, ...], row i drawn from keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)
