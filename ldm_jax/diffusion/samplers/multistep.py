"""Deterministic and stochastic samplers that remember predictions: one evaluation a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.parameterisation import Predict
from ldm_jax.diffusion.samplers import loop
from ldm_jax.diffusion.samplers.linear import plan, walk
from ldm_jax.errors import InputError


def dpmpp_1s(
    predict: Predict, grid: Grid, z_T: jax.Array, cond: Any, keys: jax.Array, **options: Any
) -> Any:
    """z0 by DPM-Solver++ of order 1 (eq. 8 with k = 1): DDIM at eta 0, in another form."""
    of_x0 = -grid.alpha[1:] * np.expm1(-_steps(grid))
    steps = plan(grid, of_z=grid.sigma[1:] / grid.sigma[:-1], of_x0=of_x0)
    return walk(predict, grid, steps, z_T, cond, keys, **options)


def dpmpp_2m(
    predict: Predict, grid: Grid, z_T: jax.Array, cond: Any, keys: jax.Array, **options: Any
) -> Any:
    """z0 by DPM-Solver++(2M) (algorithm 2), order 2; order 1 where lambda is infinite.

    The last of fewer than 15 steps has order 1 too, which is steadier.
    """
    of_x0 = -grid.alpha[1:] * np.expm1(-_steps(grid))
    steps = plan(
        grid,
        of_z=grid.sigma[1:] / grid.sigma[:-1],
        of_x0=of_x0[:, None] * _extrapolation(grid),
    )
    return walk(predict, grid, steps, z_T, cond, keys, **options)


def dpmpp_2m_sde(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """z0 by SDE-DPM-Solver++(2M): `dpmpp_2m` with all noise drawn anew; order 1 is `ddpm`."""
    h = _steps(grid)
    of_x0 = -grid.alpha[1:] * np.expm1(-2 * h)
    steps = plan(
        grid,
        of_z=grid.sigma[1:] / grid.sigma[:-1] * np.exp(-h),
        of_x0=of_x0[:, None] * _extrapolation(grid),
        of_noise=grid.sigma[1:] * np.sqrt(-np.expm1(-2 * h)),
    )
    return walk(predict, grid, steps, z_T, cond, keys, temperature=temperature, **options)


def _steps(grid: Grid) -> np.ndarray:
    """h [S] > 0: how far each step goes in lambda."""
    return np.diff(grid.log_ratio)


def _extrapolation(grid: Grid) -> np.ndarray:
    """The weights [S, 2] of this x0 and the last one in their value half a step ahead."""
    h, count = _steps(grid), grid.num_steps
    ahead = np.zeros(count)
    finite = np.isfinite(h[1:]) & np.isfinite(h[:-1])
    ahead[1:] = np.where(finite, h[1:], 0) / np.where(finite, 2 * h[:-1], 1)
    if count < 15:
        ahead[-1] = 0
    return np.stack([1 + ahead, -ahead], axis=1)


ADAMS_BASHFORTH = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    predict: Predict, grid: Grid, z_T: jax.Array, cond: Any, keys: jax.Array, **options: Any
) -> Any:
    """z0 by PLMS: DDIM steps along the noise that the last four extrapolate (PNDM, eq. 12).

    The first step is taken twice, the second time with the mean of the noise at both its ends: S
    steps are S + 1 evaluations, and `every` counts those. Raises InputError where alpha is 0.
    """
    if np.any(grid.alpha[:-1] == 0):
        raise InputError(
            "sampler 'plms' extrapolates the noise, which says nothing where alpha is 0, and this "
            "grid begins there; use 'dpmpp_2m'"
        )
    count = grid.num_steps
    # Place and step of each evaluation: the second is at the first step's end.
    place = np.r_[0, 1, 1:count] if count > 1 else np.zeros(1, int)
    steps = np.r_[0, 0, 1:count] if count > 1 else np.zeros(1, int)
    again = np.arange(len(place)) == 1
    stretch = grid.alpha[1:] / grid.alpha[:-1]
    along = grid.sigma[1:] - stretch * grid.sigma[:-1]
    weights = np.array([ADAMS_BASHFORTH[min(k, 3)] for k in steps])
    weights[again] = (1 / 2, 1 / 2, 0, 0)
    coefficients = {
        "of_z": np.where(again, 0, stretch[steps]),
        "of_first": np.where(again, stretch[steps], 0),
        "of_eps": along[steps][:, None] * weights,
        "again": again,
    }
    state = loop.as_state(z_T)
    memory = (state, jnp.zeros((3, *state.shape), state.dtype))

    def body(z_t: jax.Array, memory: Any, step: loop.Step, c: Any) -> tuple:
        first, past = memory
        x0, eps, *_ = predict(z_t, loop.at(step.t, z_t), cond)
        recent = jnp.concatenate([eps[None], past])
        onward = c["of_z"] * z_t + c["of_first"] * first
        onward = onward + sum(c["of_eps"][k] * recent[k] for k in range(4))
        return onward, x0, (first, jnp.where(c["again"], past, recent[:3]))

    places = (grid.times[place], grid.alpha[place], grid.sigma[place])
    return loop.scan(body, places, z_T, keys, memory, coefficients, **options)
