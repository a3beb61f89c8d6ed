"""Guidance by the gradient of a likelihood: a classifier's, or of a picture's degraded likeness."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.guidance import Convert, Scale
from ldm_jax.diffusion.process import Denoiser

LogLikelihood = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(z_t [B, ...], the prediction's x0 [B, ...], t [B]) -> log p(y | z_t) [B], up to a constant.

A classifier of noisy latents looks at z_t; -|y - degrade(decode(x0))|^2 / 2, or minus LPIPS in the
square's place, at x0. A row may depend on that row only.
"""

GAINS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "eps": lambda alpha, sigma: -sigma,
    "x0": lambda alpha, sigma: sigma**2 / alpha,
    "v": lambda alpha, sigma: -sigma / alpha,  # v = alpha eps - sigma x0, alpha^2 + sigma^2 = 1
    "velocity": lambda alpha, sigma: -sigma / alpha,  # eps - x0 on the path alpha + sigma = 1
}
"""How far a prediction moves for a score that grows by 1: z_t = alpha x0 + sigma eps is held, and
the score is -eps / sigma."""


def gradient(
    denoiser: Denoiser,
    to_x0: Convert,
    log_likelihood: LogLikelihood,
    gain: Callable[[jax.Array], jax.Array],
    scale: Scale,
) -> Denoiser:
    """The denoiser of the score plus scale times the gradient by z_t of log p(y | z_t).

    `gain` gives [B] for times t [B]: an entry of GAINS at alpha_t and sigma_t. For eps that is
    eps - sigma scale grad: the sign that raises the likelihood (ADM, algorithm 2), where LDM's
    appendix C prints a plus. The gradient passes through the denoiser. `scale` is [] or [B], may
    be traced, and at 0 leaves the denoiser as it is, bit for bit.
    """

    def guided(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        def likelihood(z_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            prediction = denoiser(z_t, t, cond).astype(jnp.float32)
            x0 = to_x0(z_t, prediction[..., : z_t.shape[-1]], t)
            each = log_likelihood(z_t, x0, t)
            assert each.shape == t.shape, f"log-likelihood {each.shape} must be one a row {t.shape}"
            return jnp.sum(each), prediction

        grad, prediction = jax.grad(likelihood, has_aux=True)(z_t)
        # A learned variance, beside z_t's channels, is left alone.
        beside = [(0, 0)] * (z_t.ndim - 1) + [(0, prediction.shape[-1] - z_t.shape[-1])]
        grad = jnp.pad(grad, beside)
        by = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), t.shape)
        factor = (by * gain(t)).reshape(t.shape + (1,) * (z_t.ndim - 1))
        off = (by == 0).reshape(factor.shape)
        return jnp.where(off, prediction, prediction + factor * grad)

    return guided
