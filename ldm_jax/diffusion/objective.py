"""What a denoiser is trained on: the draw of timesteps and the loss of its noise prediction."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import Denoiser, Schedule, corrupt
from ldm_jax.errors import InputError

LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"l1": jnp.abs, "l2": jnp.square}
"""Elementwise penalty of the error, prediction - target."""


def uniform_timesteps(keys: jax.Array, num_timesteps: int) -> jax.Array:
    """t [B] int32, uniform on 0..num_timesteps-1, row i drawn from keys[i]; 0 is the data end."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps, jnp.int32))(keys)


def denoising_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    z0: jax.Array,
    cond: Any,
    t: jax.Array,
    noise: jax.Array,
    loss: str = "l2",
) -> jax.Array:
    """The loss [B] f32 of predicting the noise in z0 [B, H, W, C] at timesteps t [B], 0 = data.

    Averaged over H, W and C, unweighted (DDPM eq. 14, LDM eq. 2). `cond` has leading axis B.
    Raises InputError for a `loss` that is not in LOSSES.
    """
    if loss not in LOSSES:
        raise InputError(f"loss {loss!r} is unknown; choose one of {list(LOSSES)}")
    eps = denoiser(corrupt(schedule, z0, noise, t), t, cond)
    # An eps of [B, H, W, 1] would broadcast to a plausible number.
    assert eps.shape == noise.shape, f"prediction {eps.shape} must have z0's shape {noise.shape}"
    error = eps.astype(jnp.float32) - noise.astype(jnp.float32)
    return jnp.mean(LOSSES[loss](error), axis=tuple(range(1, error.ndim)))
