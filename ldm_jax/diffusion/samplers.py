"""Samplers of the discrete process: from noise z_T to z0, each one `lax.scan`.

Every entry of SAMPLERS has the signature of `ddim`. Timesteps are integers, 0 = data. Coefficients
are computed on the host in f64 and enter the loop as f32, as does the state. The noise of sample i
is a function of keys[i] and the step alone, so a sample does not depend on the batch it is in.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import Denoiser, Schedule, z0_from_eps
from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like


def uniform_grid(num_timesteps: int, num_steps: int) -> np.ndarray:
    """The timesteps [S] int32 that S = num_steps visit, increasing: floor(i T / S) + 1.

    For S that divides T this is LDM's grid (1, 21, ..., 981 for 50 of 1000), extended to give
    exactly S different timesteps for every S. S = T visits every timestep, 0..T-1. The spacing is
    a leading one: few steps start well below T-1. Raises InputError unless 1 <= S <= T.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
        raise InputError(f"num_steps {num_steps!r} must be a whole number; try 50")
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(
            f"num_steps {num_steps} must lie between 1 and the schedule's {num_timesteps} "
            f"timesteps; nearest: {min(max(num_steps, 1), num_timesteps)}"
        )
    if num_steps == num_timesteps:
        return np.arange(num_timesteps, dtype=np.int32)
    return (np.arange(num_steps) * num_timesteps // num_steps + 1).astype(np.int32)


def ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    num_steps: int,
    eta: float = 0.0,
) -> jax.Array:
    """z0 [B, H, W, C] f32 by DDIM from standard normal z_T [B, H, W, C] (DDIM eq. 12 and 16).

    `denoiser` predicts the noise. `cond` has leading axis B; `keys` [B] must not have drawn z_T.
    `eta` 0 is deterministic and draws nothing, 1 has DDPM's posterior variance. Like LDM's, the
    last step ends at alpha_bar_0, not at 1, unless num_steps is T. Raises InputError for num_steps
    outside 1..T or eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta {eta} must lie in [0, 1]; 0 = deterministic, 1 = DDPM's variance")
    t, alpha_bar, alpha_bar_to = _transitions(schedule, num_steps)
    variance = eta**2 * (1 - alpha_bar_to) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_to)
    coefficients = _f32(
        np.sqrt(alpha_bar_to),
        np.sqrt(np.maximum(1 - alpha_bar_to - variance, 0)),
        np.sqrt(variance),
    )

    def step(z_t, xs):
        index, t, (alpha_to, direction, noise_std) = xs
        z0, eps = _predict(denoiser, schedule, z_t, t, cond)
        z_t = alpha_to * z0 + direction * eps
        if eta > 0:
            z_t += noise_std * _step_noise(keys, index, z_t)
        return z_t, None

    return _scan(step, z_T, t, coefficients)


def ddpm(
    denoiser: Denoiser,
    schedule: Schedule,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    num_steps: int,
    eta: float = 1.0,
) -> jax.Array:
    """z0 [B, H, W, C] f32 by ancestral sampling of the posterior (DDPM eq. 6 and 7).

    num_steps = T is the chain of the paper; fewer run the same posterior between the timesteps of
    `uniform_grid`. Its law is that of `ddim` at eta = 1. `denoiser` predicts the noise. `cond` has
    leading axis B; `keys` [B] must not have drawn z_T. Raises InputError for num_steps outside
    1..T, or for another `eta`, which this chain has no use for.
    """
    if eta != 1:
        raise InputError(f"eta {eta} must be 1 for ddpm; leave it out, or use sampler ddim")
    t, alpha_bar, alpha_bar_to = _transitions(schedule, num_steps)
    beta = 1 - alpha_bar / alpha_bar_to
    coefficients = _f32(
        np.sqrt(alpha_bar_to) * beta / (1 - alpha_bar),
        np.sqrt(1 - beta) * (1 - alpha_bar_to) / (1 - alpha_bar),
        # 0 where the target is data itself (alpha_bar 1): the last draw is then not used.
        np.sqrt((1 - alpha_bar_to) / (1 - alpha_bar) * beta),
    )

    def step(z_t, xs):
        index, t, (of_z0, of_z_t, noise_std) = xs
        z0, _ = _predict(denoiser, schedule, z_t, t, cond)
        return of_z0 * z0 + of_z_t * z_t + noise_std * _step_noise(keys, index, z_t), None

    return _scan(step, z_T, t, coefficients)


SAMPLERS: dict[str, Callable[..., jax.Array]] = {"ddpm": ddpm, "ddim": ddim}


def _transitions(schedule: Schedule, num_steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, alpha_bar at t, alpha_bar after the step), each [S], from the noise end to the data."""
    t = uniform_grid(schedule.num_timesteps, num_steps)
    alpha_bar = schedule.alpha_bar[t]
    # A grid that begins at 1 leaves alpha_bar_0 to end on; one that visits 0 has only data left.
    end = 1.0 if t[0] == 0 else schedule.alpha_bar[0]
    alpha_bar_to = np.concatenate([[end], alpha_bar[:-1]])
    return t[::-1], alpha_bar[::-1], alpha_bar_to[::-1]


def _f32(*coefficients: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(c, jnp.float32) for c in coefficients)


def _scan(step: Callable, z_T: jax.Array, t: np.ndarray, coefficients: Any) -> jax.Array:
    xs = (jnp.arange(len(t)), jnp.asarray(t), coefficients)
    return jax.lax.scan(step, z_T.astype(jnp.float32), xs)[0]


def _predict(
    denoiser: Denoiser, schedule: Schedule, z_t: jax.Array, t: jax.Array, cond: Any
) -> tuple[jax.Array, jax.Array]:
    """(z0, eps) [B, ...] f32 that the denoiser sees in z_t [B, ...] at the one timestep t []."""
    t = jnp.broadcast_to(t, z_t.shape[:1])
    eps = denoiser(z_t, t, cond).astype(jnp.float32)
    assert eps.shape == z_t.shape, f"prediction {eps.shape} must have z_t's shape {z_t.shape}"
    return z0_from_eps(schedule, z_t, eps, t), eps


def _step_noise(keys: jax.Array, index: jax.Array, like: jax.Array) -> jax.Array:
    return normal_like(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index), like)
