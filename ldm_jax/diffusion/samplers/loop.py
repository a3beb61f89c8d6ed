"""The loop under every sampler: one `lax.scan`, whose coefficients come from the host.

The state is f32 (f64 when z_T is). The noise of sample i at a step is a function of keys[i] and the
step alone, so a sample does not depend on the batch it is in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.keys import normal_like


class Known(NamedTuple):
    """What inpainting by replacement keeps: z0 [B, H, W, C] where mask (1 = keep) says so."""

    z0: jax.Array
    mask: jax.Array  # of a shape that broadcasts to z0's, rank for rank


class Step(NamedTuple):
    """One iteration's place: its index [] and the native time, alpha and sigma [] it begins at."""

    index: jax.Array
    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array


Body = Callable[[jax.Array, Any, Step, Any], tuple[jax.Array, jax.Array, Any]]
"""(z_t, memory, step, coefficients of the step) -> (next z_t, predicted x0, memory)."""


def scan(
    body: Body,
    places: tuple[np.ndarray, np.ndarray, np.ndarray],
    z_T: jax.Array,
    keys: jax.Array,
    memory: Any,
    coefficients: Any,
    *,
    known: Known | None = None,
    every: int = 0,
) -> Any:
    """z0 [B, H, W, C]; with `every` > 0 (z0, x0 [N // every, B, H, W, C] at every so many steps).

    `places` are (t, alpha, sigma), each [N], where the N iterations begin. With `known` the state
    is before each iteration replaced by known z0 with fresh noise, and at the end by known z0.
    """
    state = as_state(z_T)

    def numbers(c: np.ndarray) -> jax.Array:
        return jnp.asarray(c, c.dtype if c.dtype.kind in "ib" else state.dtype)

    count = len(places[0])
    steps = Step(jnp.arange(count), *(numbers(np.asarray(p)) for p in places))
    frames = jnp.zeros((count // every if every else 0, *state.shape), state.dtype)

    def iteration(carry: Any, xs: Any) -> tuple[Any, None]:
        z_t, memory, frames = carry
        step, coefficients = xs
        if known is not None:
            noise = step_noise(keys, step.index, z_t, use=1)
            z_t = _keep(known, z_t, step.alpha * known.z0 + step.sigma * noise)
        z_t, x0, memory = body(z_t, memory, step, coefficients)
        if len(frames):
            frame = step.index // every
            # Each frame is overwritten until its last step; those of an unfinished one fall off.
            updated = jax.lax.dynamic_update_index_in_dim(frames, x0, frame, 0)
            frames = jnp.where(frame < len(frames), updated, frames)
        return (z_t, memory, frames), None

    xs = (steps, jax.tree.map(numbers, coefficients))
    (z_t, _, frames), _ = jax.lax.scan(iteration, (state, memory, frames), xs)
    z0 = z_t if known is None else _keep(known, z_t, known.z0)
    return (z0, frames) if every else z0


def as_state(z: jax.Array) -> jax.Array:
    """z in the precision of the loop's state."""
    return z.astype(jnp.promote_types(z.dtype, jnp.float32))


def step_noise(keys: jax.Array, index: jax.Array, like: jax.Array, use: int = 0) -> jax.Array:
    """Standard normal noise [B, ...] of one step; each `use` within it has its own."""
    folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index + (use << 24))
    return normal_like(folded, like)


def at(t: jax.Array, z_t: jax.Array) -> jax.Array:
    """The one time t [] as the [B] that a denoiser takes."""
    return jnp.broadcast_to(t, z_t.shape[:1])


def _keep(known: Known, z_t: jax.Array, replacement: jax.Array) -> jax.Array:
    return (known.mask * replacement + (1 - known.mask) * z_t).astype(z_t.dtype)
