"""What a denoiser predicts: one linear combination of data and noise for each name.

A target is p = a x0 + b eps. Together with z_t = alpha x0 + sigma eps it gives both back:
x0 = (b z_t - sigma p) / det and eps = (alpha p - a z_t) / det, where det = alpha b - sigma a.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion import learned_variance
from ldm_jax.diffusion.process import Denoiser, Process, rows
from ldm_jax.errors import InputError, choose

Predict = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, ...]]
"""(z_t [B, ...], native time t [B], cond) -> (x0, eps), each like z_t: what samplers speak to.

A third, where there is one, is v of `learned_variance`, for `ddpm`; others pass over it.
"""

Mixture = tuple[jax.Array, jax.Array]
"""(a, b) [B] of a target a x0 + b eps."""


def _eps(process: Process, t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Mixture:
    return jnp.zeros_like(alpha), jnp.ones_like(alpha)


def _x0(process: Process, t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Mixture:
    return jnp.ones_like(alpha), jnp.zeros_like(alpha)


def _v(process: Process, t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Mixture:
    return -sigma, alpha  # Salimans and Ho 2022, appendix D


def _velocity(process: Process, t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Mixture:
    return process.rates(t)  # dz/dt; eps - x0 on the straight path


def _preconditioned(process: Process, t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> Mixture:
    # EDM eq. 7 and table 1 for alpha = 1: x0 = c_skip z_t + c_out F, solved for F.
    std = process.config.sigma_data
    total = (alpha**2 * std**2 + sigma**2) ** 0.5
    return sigma / (std * total), -alpha * std / total


PARAMETERISATIONS: dict[str, Callable[[Process, jax.Array, jax.Array, jax.Array], Mixture]] = {
    "eps": _eps,
    "x0": _x0,
    "v": _v,
    "velocity": _velocity,
    "preconditioned": _preconditioned,
}


def check(process: Process, name: str) -> None:
    """Raises InputError for an unknown name, or one that this process cannot be predicted by."""
    choose("parameterisation", name, PARAMETERISATIONS)
    kind = process.config.kind
    if name == "eps" and process.ends_on_noise:
        raise InputError(
            f"parameterisation 'eps': {kind!r} ends on noise alone, where eps says nothing about "
            "the data; choose 'v' or 'x0'"
        )
    if name == "velocity" and process.discrete:
        raise InputError(
            f"parameterisation 'velocity': {kind!r} has timesteps, not a continuous time; choose "
            "'v', or process kind 'flow'"
        )


def determinant(process: Process, name: str, t: jax.Array) -> jax.Array:
    """det [B]: an error e of the prediction is an error -sigma e / det of x0."""
    alpha, sigma = process.coefficients(t)
    a, b = PARAMETERISATIONS[name](process, t, alpha, sigma)
    return alpha * b - sigma * a


def target(process: Process, name: str, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """What a denoiser of this parameterisation should predict [B, ...]; finite at every time."""
    if name == "eps":
        return eps
    if name == "x0":
        return x0
    a, b = PARAMETERISATIONS[name](process, t, *process.coefficients(t))
    return rows(a, x0) * x0 + rows(b, eps) * eps


def x0_and_eps(
    process: Process, name: str, z_t: jax.Array, prediction: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x0, eps) [B, ...] from a prediction in z_t [B, ...] at times t [B].

    Finite at alpha = 0 for all but `eps`, and at sigma = 0 for all but the eps of `x0`.
    """
    alpha, sigma = process.coefficients(t)
    a, b = PARAMETERISATIONS[name](process, t, alpha, sigma)
    alpha, sigma, a, b = (rows(values, z_t) for values in (alpha, sigma, a, b))
    if name == "eps":
        return (z_t - sigma * prediction) / alpha, prediction
    if name == "x0":
        return prediction, (z_t - alpha * prediction) / sigma
    det = alpha * b - sigma * a
    return (b * z_t - sigma * prediction) / det, (alpha * prediction - a * z_t) / det


def predictor(process: Process, name: str, denoiser: Denoiser) -> Predict:
    """The denoiser's prediction as data and noise; raises InputError as `check` does.

    One of twice the channels has learned its variances: they are v, the third.
    """
    check(process, name)

    def predict(z_t: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, ...]:
        p, v = denoiser(z_t, t, cond).astype(z_t.dtype), ()
        if name == "eps" and process.discrete and p.shape[-1] == 2 * z_t.shape[-1]:
            p, *v = learned_variance.split(p)
        assert p.shape == z_t.shape, f"prediction {p.shape} must have z_t's shape {z_t.shape}"
        return *x0_and_eps(process, name, z_t, p, t), *v

    return predict


def clipped(predict: Predict, process: Process, bound: float | jax.Array) -> Predict:
    """The same with x0 kept in -bound..bound, and the eps that then explains z_t."""

    def constrained(z_t: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, ...]:
        x0, _, *v = predict(z_t, t, cond)
        x0 = jnp.clip(x0, -bound, bound)
        return *x0_and_eps(process, "x0", z_t, x0, t), *v

    return constrained


def dynamically_clipped(
    predict: Predict,
    process: Process,
    quantile: float | jax.Array = 0.995,
    bound: float | jax.Array = 1.0,
) -> Predict:
    """The same with each example's x0 shrunk until its quantile of |x0| is `bound`, where above.

    What still exceeds the bound is clipped to it. Dynamic thresholding (Imagen, section 2.3, whose
    pixels have bound 1); whitened latents have a standard deviation of 1 and need a larger one.
    """

    def constrained(z_t: jax.Array, t: jax.Array, cond: Any) -> tuple[jax.Array, ...]:
        x0, _, *v = predict(z_t, t, cond)
        size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), quantile, axis=1)
        shrink = rows(jnp.maximum(size, bound) / bound, x0)
        x0 = jnp.clip(x0 / shrink, -bound, bound)
        return *x0_and_eps(process, "x0", z_t, x0, t), *v

    return constrained
