"""Heun's method, plain and with EDM's churn: two evaluations a step, one for a last onto data."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.parameterisation import Predict
from ldm_jax.diffusion.process import SigmaProcess
from ldm_jax.diffusion.samplers import loop
from ldm_jax.errors import InputError


def heun(
    predict: Predict, grid: Grid, z_T: jax.Array, cond: Any, keys: jax.Array, **options: Any
) -> Any:
    """z0 by the trapezoidal rule with an Euler step for its far end: order 2.

    Of dz = x0 d alpha + eps d sigma; for a discrete process of z / alpha, whose data is unscaled.
    """
    starts = _Starts(*grid.starts, np.zeros(grid.num_steps))
    return _walk(predict, grid, starts, z_T, cond, keys, **options)


def edm(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    inflation: float = 1.003,
    churn: float = 40.0,
    churn_from: float = 0.05,
    churn_to: float = 50.0,
    **options: Any,
) -> Any:
    """z0 by EDM's stochastic sampler (algorithm 2); `churn` 0 is `heun` and draws nothing.

    A step from sigma within churn_from..churn_to first adds noise, up to sigma times 1 +
    min(churn / S, sqrt(2) - 1), its standard deviation times `inflation` (S_noise). Raises
    InputError for a process other than `edm`, whose times alone are sigmas.
    """
    if not isinstance(grid.process, SigmaProcess):
        raise InputError(
            f"sampler 'edm' is for process kind 'edm', not {grid.process.config.kind!r}; use 'heun'"
        )
    if churn < 0:
        raise InputError(f"churn {churn} must not be negative; 0 = none")
    sigma = grid.sigma[:-1]
    churned = (churn_from <= sigma) & (sigma <= churn_to)
    raised = sigma * (1 + np.where(churned, min(churn / grid.num_steps, 2**0.5 - 1), 0))
    of_noise = inflation * np.sqrt(raised**2 - sigma**2)
    starts = _Starts(raised, grid.alpha[:-1], raised, of_noise)
    return _walk(predict, grid, starts, z_T, cond, keys, temperature=temperature, **options)


class _Starts(NamedTuple):
    """Where each step begins, all [S] f64: the grid's places, or above them by noise."""

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    of_noise: np.ndarray


def _walk(
    predict: Predict,
    grid: Grid,
    starts: _Starts,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """Heun's steps from `starts` to the grid's next times."""
    t, alpha, sigma, of_noise = starts
    scale, scale_to = grid.scale[:-1], grid.scale[1:]
    coefficients = {
        "t": t,
        "t_to": grid.times[1:],
        "alpha_to": grid.alpha[1:],
        "sigma_to": grid.sigma[1:],
        "of_z": scale_to / scale,
        "of_x0": grid.alpha[1:] - alpha * scale_to / scale,
        "of_eps": grid.sigma[1:] - sigma * scale_to / scale,
        "of_noise": of_noise,
        "lands": grid.sigma[1:] == 0,
    }
    noisy = bool(np.any(of_noise))

    def body(z_t: jax.Array, memory: Any, step: loop.Step, c: Any) -> tuple:
        if noisy:
            noise = loop.step_noise(keys, step.index, z_t)
            z_t = (z_t + temperature * c["of_noise"] * noise).astype(z_t.dtype)
        x0, eps, *_ = predict(z_t, loop.at(c["t"], z_t), cond)
        euler = c["alpha_to"] * x0 + c["sigma_to"] * eps

        def corrected() -> jax.Array:
            x0_to, eps_to, *_ = predict(euler, loop.at(c["t_to"], z_t), cond)
            slope = c["of_x0"] * (x0 + x0_to) + c["of_eps"] * (eps + eps_to)
            return c["of_z"] * z_t + slope / 2

        # On data itself there is no noise to predict.
        return jax.lax.cond(c["lands"], lambda: euler, corrected), x0, memory

    return loop.scan(body, grid.starts, z_T, keys, (), coefficients, **options)
