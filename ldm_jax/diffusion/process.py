"""Forward processes: z_t = alpha_t z_0 + sigma_t noise, discrete or continuous in time.

The convention of this floor: a larger t is noisier, 0 is the data end. The discrete kinds have
integer timesteps 0..T-1 and alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t (DDPM's alpha_t is
1 - beta_t, and DDIM's alpha_t is our alpha_bar_t). `flow` and `flow_cosine` have t in [0, 1], and
the time of `edm` is its sigma. Denoisers are called at this native time; `at_network` makes of it
what a network is given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError

Denoiser = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(z_t [B, H, W, C] f32, native time t [B], cond) -> prediction [B, H, W, C].

`cond` is a pytree of arrays with leading axis B, or None.
"""

TIME_SCALE = 1000.0  # of t in [0, 1] for a network: its embedding has the range of timesteps


@dataclass(frozen=True)
class ProcessConfig:
    kind: str = "ldm_linear"  # a name in TABLES (discrete timesteps) or in PATHS (continuous time)
    num_timesteps: int = 1000  # T, of a discrete kind
    beta_start: float = 0.0015  # variance added by the first step, in (0, 1); the linear kinds
    beta_end: float = 0.0195  # by the last, beta_start <= beta_end < 1
    zero_terminal_snr: bool = False  # a discrete kind rescaled to end on noise alone
    sigma_data: float = 1.0  # the data's standard deviation; whitened latents have 1
    sigma_min: float = 0.002  # where sampling of edm ends
    sigma_max: float = 80.0  # and where it begins


@dataclass(frozen=True, eq=False)
class Process:
    """A process as host arrays; compared by identity, so a jitted closure may hold it."""

    config: ProcessConfig
    alpha_bar: np.ndarray  # [T] f64, share of the variance that is data; [0] of a continuous kind
    alpha: np.ndarray  # [T] f64, sqrt(alpha_bar)
    sigma: np.ndarray  # [T] f64, sqrt(1 - alpha_bar)

    @property
    def num_timesteps(self) -> int:
        """T of a discrete process, 0 of a continuous one."""
        return len(self.alpha_bar)

    @property
    def discrete(self) -> bool:
        return self.num_timesteps > 0

    @property
    def ends_on_noise(self) -> bool:
        """Whether alpha is 0 at the noise end, where noise tells nothing about the data."""
        if self.discrete:
            return bool(self.alpha[-1] == 0)
        return self.config.kind in ("flow", "flow_cosine")


def ldm_linear(config: ProcessConfig) -> np.ndarray:
    """alpha_bar [T] f64 with sqrt(beta) linear in t: the "linear" of LDM's code and configs."""
    root = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps)
    return np.cumprod(1 - root**2)


def ddpm_linear(config: ProcessConfig) -> np.ndarray:
    """alpha_bar [T] f64 with beta linear in t (DDPM, section 4; LDM's code: "sqrt_linear")."""
    beta = np.linspace(config.beta_start, config.beta_end, config.num_timesteps)
    return np.cumprod(1 - beta)


def cosine(config: ProcessConfig) -> np.ndarray:
    """alpha_bar [T] f64, a squared cosine with offset 0.008 and beta <= 0.999 (IDDPM eq. 17)."""
    u = np.arange(config.num_timesteps + 1) / config.num_timesteps
    ideal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - ideal[1:] / ideal[:-1], 0.999))


def flow(t: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """(alpha, sigma) and their derivatives on the straight path (rectified flow)."""
    return 1 - t, t, -xp.ones_like(t), xp.ones_like(t)


def flow_cosine(t: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """The same on the circle, alpha = cos(pi t / 2): SiT's generalised variance preserving path."""
    quarter = np.pi / 2
    # A sine of the rest is exactly 0 at t = 1, where a rounded cosine is not.
    alpha, sigma = xp.sin(quarter * (1 - t)), xp.sin(quarter * t)
    return alpha, sigma, -quarter * sigma, quarter * alpha


def edm(t: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """The same where noise is added to unscaled data and its sigma is the time (EDM, section 3)."""
    return xp.ones_like(t), t, xp.zeros_like(t), xp.ones_like(t)


TABLES: dict[str, Callable[[ProcessConfig], np.ndarray]] = {
    "ldm_linear": ldm_linear,
    "ddpm_linear": ddpm_linear,
    "cosine": cosine,
}
PATHS: dict[str, Callable[[Any, Any], tuple[Any, Any, Any, Any]]] = {
    "flow": flow,
    "flow_cosine": flow_cosine,
    "edm": edm,
}
KINDS = (*TABLES, *PATHS)


def make_process(config: ProcessConfig) -> Process:
    """The process a config describes; raises InputError for a field outside its range."""
    kind, num_timesteps = config.kind, config.num_timesteps
    if kind not in KINDS:
        raise InputError(f"process kind {kind!r} is unknown; choose one of {list(KINDS)}")
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise InputError(
            f"num_timesteps {num_timesteps!r} must be a whole number of at least 1; LDM uses 1000"
        )
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise InputError(
            f"beta_start {config.beta_start} and beta_end {config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1; LDM uses 0.0015 and 0.0195"
        )
    if not 0 < config.sigma_data < np.inf:
        raise InputError(f"sigma_data {config.sigma_data} must be positive; whitened latents: 1")
    if not 0 < config.sigma_min < config.sigma_max < np.inf:
        raise InputError(
            f"sigma_min {config.sigma_min} and sigma_max {config.sigma_max} must satisfy "
            "0 < sigma_min < sigma_max; EDM uses 0.002 and 80"
        )
    if config.zero_terminal_snr and (kind not in TABLES or num_timesteps < 2):
        raise InputError(
            f"zero_terminal_snr is for the kinds {list(TABLES)} of at least 2 timesteps, not for "
            f"{kind!r} of {num_timesteps}; leave it out"
        )
    alpha_bar = TABLES[kind](config) if kind in TABLES else np.zeros(0)
    if config.zero_terminal_snr:
        alpha_bar = zero_terminal_snr(alpha_bar)
    return Process(config, alpha_bar, np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))


def zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """alpha_bar [T] moved to end on 0 and stretched to keep its first (Lin et al. 2023, alg. 1)."""
    alpha = np.sqrt(alpha_bar)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def coefficients(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma), traced, at native times t; a discrete process also answers between its own.

    There the logarithm of sigma / alpha is interpolated, as k-diffusion does.
    """
    if not process.discrete:
        return PATHS[process.config.kind](t, jnp)[:2]
    if jnp.issubdtype(t.dtype, jnp.integer):
        return jnp.asarray(process.alpha)[t], jnp.asarray(process.sigma)[t]
    ratio = np.log(process.sigma) - np.log(process.alpha)
    log_ratio = jnp.interp(t, np.arange(len(ratio), dtype=float), ratio)
    return jax.nn.sigmoid(-2 * log_ratio) ** 0.5, jax.nn.sigmoid(2 * log_ratio) ** 0.5


def rates(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(d alpha / dt, d sigma / dt) of a continuous process at native times t, traced."""
    return PATHS[process.config.kind](t, jnp)[2:]


def host_coefficients(process: Process, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) f64 at native times t: whole timesteps of a discrete process."""
    if process.discrete:
        return process.alpha[t], process.sigma[t]
    return PATHS[process.config.kind](np.asarray(t, np.float64), np)[:2]


def time_of_ratio(process: Process, ratio: np.ndarray) -> np.ndarray:
    """The native time f64 at which sigma / alpha is `ratio`; fractional timesteps of a table."""
    if process.discrete:
        table = np.log(process.sigma) - np.log(process.alpha)
        return np.interp(np.log(ratio), table, np.arange(len(table), dtype=float))
    inverse = {
        "flow": lambda r: r / (1 + r),
        "flow_cosine": lambda r: np.arctan(r) * 2 / np.pi,
        "edm": lambda r: r,
    }
    return inverse[process.config.kind](np.asarray(ratio, np.float64))


def at_network(process: Process, network: Denoiser) -> Denoiser:
    """The denoiser, at native times, that a network makes.

    The network's time is the timestep, 1000 t for t in [0, 1], ln(sigma) / 4 for edm, whose input
    is also divided by its standard deviation (EDM, table 1: c_noise and c_in).
    """

    def denoiser(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        if process.discrete:
            return network(z_t, t, cond)
        if process.config.kind == "edm":
            scale = (process.config.sigma_data**2 + t**2) ** -0.5
            return network(rows(scale, z_t) * z_t, jnp.log(t) / 4, cond)
        return network(z_t, TIME_SCALE * t, cond)

    return denoiser


def unit_time(process: Process, t: jax.Array) -> jax.Array:
    """Native times [B] as places in [0, 1], f32: edm's by the logarithm, clipped to its range."""
    if process.discrete:
        return t / process.num_timesteps
    if process.config.kind != "edm":
        return t
    low, high = np.log(process.config.sigma_min), np.log(process.config.sigma_max)
    return jnp.clip((jnp.log(t) - low) / (high - low), 0.0, 1.0)


def native_time(process: Process, u: float) -> float:
    """The native time of a place u in [0, 1], the inverse of `unit_time`; fractional timesteps."""
    if process.discrete:
        return u * process.num_timesteps
    if process.config.kind != "edm":
        return u
    return process.config.sigma_min ** (1 - u) * process.config.sigma_max**u


def corrupt(process: Process, z0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """z_t [B, ...] from z0 and standard normal noise [B, ...] at times t [B] (DDPM eq. 4)."""
    alpha, sigma = coefficients(process, t)
    return rows(alpha, z0) * z0 + rows(sigma, z0) * noise


def z0_from_eps(process: Process, z_t: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """z0 [B, ...] from z_t and its noise [B, ...] at times t [B] (DDPM eq. 15)."""
    alpha, sigma = coefficients(process, t)
    return (z_t - rows(sigma, z_t) * eps) / rows(alpha, z_t)


def eps_from_z0(process: Process, z_t: jax.Array, z0: jax.Array, t: jax.Array) -> jax.Array:
    """The noise [B, ...] in z_t, given z0 [B, ...], at times t [B] (DDPM eq. 15)."""
    alpha, sigma = coefficients(process, t)
    return (z_t - rows(alpha, z_t) * z0) / rows(sigma, z_t)


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """values [B] shaped [B, 1, ...] to scale an array like `like` [B, ...], in its precision."""
    assert values.shape == like.shape[:1], f"{values.shape} must be [B] for an array {like.shape}"
    values = values.astype(jnp.promote_types(like.dtype, jnp.float32))
    return values.reshape(values.shape + (1,) * (like.ndim - 1))
