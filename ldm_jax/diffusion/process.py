"""Discrete noise schedules and the forward process.

The convention of this floor: t is an integer timestep in 0..T-1, 0 is the data end and T-1 the
noise end. z_t = alpha_t z_0 + sigma_t noise, where alpha_t^2 = alpha_bar_t and sigma_t^2 =
1 - alpha_bar_t. DDPM's alpha_t is 1 - beta_t, and DDIM's alpha_t is our alpha_bar_t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError

Denoiser = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(z_t [B, H, W, C] f32, t [B] int32, cond) -> prediction [B, H, W, C].

`cond` is a pytree of arrays with leading axis B, or None.
"""


@dataclass(frozen=True)
class ScheduleConfig:
    kind: str = "ldm_linear"  # a name in SCHEDULES
    num_timesteps: int = 1000  # T
    beta_start: float = 0.0015  # variance added by the first step, in (0, 1)
    beta_end: float = 0.0195  # by the last, beta_start <= beta_end < 1


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule as host arrays; compared by identity, so a jitted closure may hold it."""

    alpha_bar: np.ndarray  # [T] f64, share of the variance that is data; decreasing
    alpha: np.ndarray  # [T] f32, sqrt(alpha_bar)
    sigma: np.ndarray  # [T] f32, sqrt(1 - alpha_bar)

    @property
    def num_timesteps(self) -> int:
        return len(self.alpha_bar)


def ldm_linear(config: ScheduleConfig) -> np.ndarray:
    """alpha_bar [T] f64 with sqrt(beta) linear in t: the "linear" of LDM's code and configs."""
    root = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps)
    return np.cumprod(1 - root**2)


def ddpm_linear(config: ScheduleConfig) -> np.ndarray:
    """alpha_bar [T] f64 with beta linear in t (DDPM, section 4; LDM's code: "sqrt_linear")."""
    beta = np.linspace(config.beta_start, config.beta_end, config.num_timesteps)
    return np.cumprod(1 - beta)


SCHEDULES: dict[str, Callable[[ScheduleConfig], np.ndarray]] = {
    "ldm_linear": ldm_linear,
    "ddpm_linear": ddpm_linear,
}


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule a config describes; raises InputError for a field outside its range."""
    kind, num_timesteps = config.kind, config.num_timesteps
    if kind not in SCHEDULES:
        raise InputError(f"schedule kind {kind!r} is unknown; choose one of {list(SCHEDULES)}")
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise InputError(
            f"num_timesteps {num_timesteps!r} must be a whole number of at least 1; LDM uses 1000"
        )
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise InputError(
            f"beta_start {config.beta_start} and beta_end {config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1; LDM uses 0.0015 and 0.0195"
        )
    alpha_bar = SCHEDULES[kind](config)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return Schedule(alpha_bar, alpha.astype(np.float32), sigma.astype(np.float32))


def corrupt(schedule: Schedule, z0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """z_t [B, ...] from z0 and standard normal noise [B, ...] at timesteps t [B] (DDPM eq. 4)."""
    return _at(schedule.alpha, t, z0) * z0 + _at(schedule.sigma, t, z0) * noise


def z0_from_eps(schedule: Schedule, z_t: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """z0 [B, ...] from z_t and its noise [B, ...] at timesteps t [B] (DDPM eq. 15)."""
    return (z_t - _at(schedule.sigma, t, z_t) * eps) / _at(schedule.alpha, t, z_t)


def eps_from_z0(schedule: Schedule, z_t: jax.Array, z0: jax.Array, t: jax.Array) -> jax.Array:
    """The noise [B, ...] in z_t, given z0 [B, ...], at timesteps t [B] (DDPM eq. 15)."""
    return (z_t - _at(schedule.alpha, t, z_t) * z0) / _at(schedule.sigma, t, z_t)


def _at(values: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
    """values[t] shaped [B, 1, ...] to scale an array like `like` [B, ...]."""
    assert t.shape == like.shape[:1], f"t {t.shape} must be [B] for an array {like.shape}"
    assert jnp.issubdtype(t.dtype, jnp.integer), f"t must be integer timesteps, not {t.dtype}"
    return jnp.asarray(values)[t].reshape(t.shape + (1,) * (like.ndim - 1))
