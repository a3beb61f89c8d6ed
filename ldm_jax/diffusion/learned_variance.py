"""Learned reverse variances of a discrete process: the hybrid objective of IDDPM, ADM and DiT.

The network has 2C channels: eps, and v in about -1..1, which is where the logarithm of the variance
lies between the posterior's and beta's. t are timesteps [B], 0 = data.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ldm_jax.diffusion.process import TableProcess, example_means, rows


def split(prediction: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(eps, v) [B, H, W, C] of a prediction [B, H, W, 2C]."""
    eps, v = jnp.split(prediction, 2, axis=-1)
    return eps, v


def posterior(process: TableProcess, z0: jax.Array, z_t: jax.Array, t: jax.Array) -> jax.Array:
    """Mean [B, ...] of q(z_(t-1) | z_t, z0) (DDPM eq. 7)."""
    at = _rows_at(process, t, z_t)
    return at("of_z0") * z0 + at("of_z_t") * z_t


def log_variance(process: TableProcess, v: jax.Array, t: jax.Array) -> jax.Array:
    """ln of the reverse step's variance [B, ...]: v = -1 the posterior's, 1 beta (IDDPM eq. 15)."""
    at, share = _rows_at(process, t, v), (v + 1) / 2
    return share * at("log_beta") + (1 - share) * at("log_posterior")


def hybrid_vlb(
    process: TableProcess,
    z0: jax.Array,
    z_t: jax.Array,
    eps: jax.Array,
    v: jax.Array,
    t: jax.Array,
    channel_weights: ArrayLike | None = None,
) -> jax.Array:
    """The variational bound's term [B] in nats a value, whose gradient reaches v alone.

    KL(posterior || reverse step) for t > 0 and at t = 0 the density of z0, both averaged (IDDPM
    section 3.1), by weights [C] if there are some. The hybrid loss adds `hybrid_weight` times this
    to the mean square.
    """
    at = _rows_at(process, t, z_t)
    eps = jax.lax.stop_gradient(eps)
    guess = (z_t - at("sigma") * eps) / at("alpha")
    mean, log_var = posterior(process, guess, z_t, t), log_variance(process, v, t)
    true_mean, true_log_var = posterior(process, z0, z_t, t), at("log_posterior")
    distance = (true_mean - mean) ** 2 * jnp.exp(-log_var)
    kl = (log_var - true_log_var + jnp.exp(true_log_var - log_var) - 1 + distance) / 2
    # Latents are continuous: the density itself, not its integral over a bin of pixel values.
    density = (np.log(2 * np.pi) + log_var + (z0 - mean) ** 2 * jnp.exp(-log_var)) / 2
    term = jnp.where(rows(t, z_t) > 0, kl, density)
    return example_means(term, channel_weights)


def hybrid_weight(process: TableProcess) -> float:
    """0.001 T, for the sum over all timesteps (IDDPM eq. 16), and in bits, as ADM and DiT have it.

    DiT's own lacks the T, which is 1 at its 1000 timesteps.
    """
    return 0.001 * process.num_timesteps / np.log(2)


def _rows_at(process: TableProcess, t: jax.Array, like: jax.Array) -> Callable[[str], jax.Array]:
    """A name of `_tables` to its values at times t [B], shaped to scale `like` [B, ...]."""
    tables = _tables(process)

    def at(name: str) -> jax.Array:
        return rows(jnp.asarray(tables[name])[t], like)

    return at


def _tables(process: TableProcess) -> dict[str, np.ndarray]:
    """Of every timestep [T] f64; the variance of t = 0, which is 0, is replaced by that of 1."""
    assert process.num_timesteps > 1, "the one timestep of a chain has no posterior variance"
    alpha_bar = process.alpha_bar
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    return {
        "alpha": process.alpha,
        "sigma": process.sigma,
        "of_z0": np.sqrt(before) * beta / (1 - alpha_bar),
        "of_z_t": np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar),
        "log_beta": np.log(beta),
        "log_posterior": np.log(np.append(variance[1], variance[1:])),
    }
