"""Guidance: from a denoiser to a denoiser."""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import Denoiser


def classifier_free(denoiser: Denoiser, scale: float | jax.Array, null_cond: Any) -> Denoiser:
    """A denoiser that extrapolates from its null condition towards the one it is given.

    eps = eps_null + scale (eps_cond - eps_null), in f32: scale 0 is the unconditional model, 1 the
    conditional one, bit for bit, and above 1 extrapolates. `scale` is a scalar and may be traced.
    `null_cond` has cond's tree; each leaf broadcasts to cond's leaf [B, ...], so one row serves
    every batch. Both predictions come from one call on [2B, ...], the null half first.
    Classifier-free guidance, eq. 6, where the scale is 1 + w.
    """

    def guided(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        both_cond = jax.tree.map(_null_then_cond, null_cond, cond)
        both = denoiser(jnp.concatenate([z_t, z_t]), jnp.concatenate([t, t]), both_cond)
        eps_null, eps_cond = jnp.split(both.astype(jnp.float32), 2)
        eps = eps_null + scale * (eps_cond - eps_null)
        # a + (b - a) is not b in floating point.
        return jnp.where(jnp.equal(scale, 1), eps_cond, eps)

    return guided


def _null_then_cond(null: Any, cond: jax.Array) -> jax.Array:
    null = jnp.broadcast_to(jnp.asarray(null, cond.dtype), cond.shape)
    return jnp.concatenate([null, cond])  # 2 x [B, ...] -> [2B, ...]
