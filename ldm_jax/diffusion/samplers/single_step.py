"""Samplers with one evaluation a step and no memory.

For `predict`, `grid`, `z_T` (the state at the grid's first time, see `Grid.start`), `cond` with
leading axis B, keys [B] that have drawn nothing yet, and `known` and `every` of `loop.scan`.
"""

from typing import Any

import jax
import numpy as np

from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.parameterisation import Predict
from ldm_jax.diffusion.samplers.linear import plan, walk
from ldm_jax.errors import InputError, within


def ddim(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    eta: float = 0.0,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """z0 [B, H, W, C] by DDIM (eq. 12 and 16), for any process.

    `eta` 0 is deterministic and draws nothing, 1 has DDPM's posterior variance. `temperature`
    multiplies the noise of the steps. Raises InputError for eta outside [0, 1].
    """
    within("eta", eta, "[0, 1]", "0 = deterministic, 1 = DDPM's variance")
    variance = eta**2 * posterior_variance(grid)
    direction = np.sqrt(np.maximum(grid.sigma[1:] ** 2 - variance, 0))
    steps = plan(grid, of_x0=grid.alpha[1:], of_eps=direction, of_noise=np.sqrt(variance))
    return walk(predict, grid, steps, z_T, cond, keys, temperature=temperature, **options)


def ddpm(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """z0 [B, H, W, C] by ancestral sampling of the posterior (DDPM eq. 6 and 7), for any process.

    A grid of all T timesteps is the chain of the paper. Its law is that of `ddim` at eta = 1, but
    for a denoiser of learned variances: theirs lie between the posterior's and beta (IDDPM eq. 15).
    """
    share = squared_ratio(grid)
    # Half of ln(beta / posterior variance) of each step; onto data itself there is no noise.
    to = np.where(grid.sigma[1:] > 0, grid.sigma[1:], grid.sigma[:-1])
    wider = np.log(grid.sigma[:-1] / to)
    steps = plan(
        grid,
        of_z=grid.alpha[:-1] * grid.sigma[1:] ** 2 / (grid.alpha[1:] * grid.sigma[:-1] ** 2),
        of_x0=grid.alpha[1:] * (1 - share),
        # 0 where the target is data itself: the last draw is then not used.
        of_noise=np.sqrt(posterior_variance(grid)),
        of_v=wider,
    )
    return walk(predict, grid, steps, z_T, cond, keys, temperature=temperature, **options)


def euler(
    predict: Predict, grid: Grid, z_T: jax.Array, cond: Any, keys: jax.Array, **options: Any
) -> Any:
    """z0 by Euler's method on dz = x0 d alpha + eps d sigma, or on its multiple by 1 / alpha.

    For every process that is DDIM at eta 0; on the straight path it is Euler's method in t.
    """
    return ddim(predict, grid, z_T, cond, keys, **options)


def euler_ancestral(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    eta: float = 1.0,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """z0 by Euler steps to below each noise level and noise up to it: DDIM, in k-diffusion's words.

    Its sigma_up and sigma_down for z / alpha are DDIM's noise and direction, with eta 1 by default.
    """
    return ddim(predict, grid, z_T, cond, keys, eta=eta, temperature=temperature, **options)


def sde_flow(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """z0 by Euler-Maruyama on the reverse SDE with diffusion 2 sigma; its last step draws nothing.

    dz = (dz/dt + eps) dt + sqrt(2 sigma) dW, backwards in t (SiT eq. 4, w = 2 sigma). Its grid is
    spacing "last_step". Raises InputError for a discrete process.
    """
    if grid.process.discrete:
        raise InputError(
            f"sampler 'sde_flow' needs a continuous time, not {grid.process.config.kind!r}; "
            "use 'ddpm'"
        )
    dt = np.diff(grid.times)
    of_noise = np.sqrt(2 * grid.sigma[:-1] * -dt)
    of_noise[-1] = 0
    steps = plan(
        grid,
        of_z=1.0,
        of_x0=np.diff(grid.alpha),
        of_eps=np.diff(grid.sigma) + dt,
        of_noise=of_noise,
    )
    return walk(predict, grid, steps, z_T, cond, keys, temperature=temperature, **options)


def squared_ratio(grid: Grid) -> np.ndarray:
    """[S]: exp(2 (lambda_s - lambda_t)) of steps s -> t, the share of old noise; 0 to 1."""
    ratio = (grid.alpha[:-1] * grid.sigma[1:]) / (grid.sigma[:-1] * grid.alpha[1:])
    return ratio**2


def posterior_variance(grid: Grid) -> np.ndarray:
    """The variance [S] of z_t given z_s and z0 for each step s -> t."""
    return grid.sigma[1:] ** 2 * (1 - squared_ratio(grid))
