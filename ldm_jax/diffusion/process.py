"""Forward processes: z_t = alpha_t z_0 + sigma_t noise, in discrete or continuous time.

The convention of this floor: a larger t is noisier, 0 is the data end. A `TableProcess` has integer
timesteps 0..T-1 and alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t (DDPM's alpha_t is
1 - beta_t, and DDIM's alpha_t is our alpha_bar_t), a `PathProcess` has t in [0, 1], and the time of
a `SigmaProcess` is its sigma. Denoisers are called at this native time; `at_network` makes of it
what a network takes. All three have the same methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ldm_jax.errors import InputError, choose, within

Denoiser = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(z_t [B, H, W, C] f32, native time t [B], cond) -> prediction [B, H, W, C].

`cond` is a pytree of arrays with leading axis B, or None.
"""

TIME_SCALE = 1000.0  # of t in [0, 1] for a network: its embedding has the range of timesteps


@dataclass(frozen=True)
class ProcessConfig:
    kind: str = "ldm_linear"  # a name in KINDS: of TABLES (discrete), of PATHS, or "edm"
    num_timesteps: int = 1000  # T, of a discrete kind
    beta_start: float = 0.0015  # variance added by the first step, in (0, 1); the linear kinds
    beta_end: float = 0.0195  # by the last, beta_start <= beta_end < 1
    zero_terminal_snr: bool = False  # a discrete kind rescaled to end on noise alone
    sigma_data: float = 1.0  # the data's standard deviation; whitened latents have 1
    sigma_min: float = 0.002  # where sampling of edm ends
    sigma_max: float = 80.0  # and where it begins


# Compared by identity, so that a jitted closure may hold one.
@dataclass(frozen=True, eq=False)
class TableProcess:
    """A table over integer timesteps; variance preserving."""

    config: ProcessConfig
    alpha_bar: np.ndarray  # [T] f64, share of the variance that is data

    discrete: ClassVar[bool] = True
    variance_exploding: ClassVar[bool] = False
    data_time: ClassVar[float] = -1  # what stands for data itself, which no timestep is

    @cached_property
    def alpha(self) -> np.ndarray:
        """[T] f64."""
        return np.sqrt(self.alpha_bar)

    @cached_property
    def sigma(self) -> np.ndarray:
        """[T] f64."""
        return np.sqrt(1 - self.alpha_bar)

    @property
    def num_timesteps(self) -> int:
        """T; 0 of a continuous process."""
        return len(self.alpha_bar)

    @property
    def ends_on_noise(self) -> bool:
        """Whether alpha is 0 at the noise end, where noise says nothing about the data."""
        return bool(self.alpha[-1] == 0)

    def ratio_range(self) -> tuple[float, float]:
        """sigma / alpha at the data end and at the noise end, where alpha must not be 0."""
        ratio = self.sigma / self.alpha
        return ratio[0], ratio[-1]

    def coefficients(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma), traced, at native times t; also between timesteps.

        There the logarithm of sigma / alpha is interpolated, as k-diffusion does.
        """
        if jnp.issubdtype(t.dtype, jnp.integer):
            return jnp.asarray(self.alpha)[t], jnp.asarray(self.sigma)[t]
        ratio = self._log_ratio()
        log_ratio = jnp.interp(t, np.arange(len(ratio), dtype=float), ratio)
        return jax.nn.sigmoid(-2 * log_ratio) ** 0.5, jax.nn.sigmoid(2 * log_ratio) ** 0.5

    def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(d alpha / dt, d sigma / dt), which a table has not."""
        raise AssertionError(f"a {self.config.kind!r} process has no rates: its time is discrete")

    def host_coefficients(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) f64 at native times t; of a table, whole timesteps."""
        return self.alpha[t], self.sigma[t]

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The native time f64 at which sigma / alpha is `ratio`; fractional timesteps."""
        log_ratio = self._log_ratio()
        return np.interp(np.log(ratio), log_ratio, np.arange(len(log_ratio), dtype=float))

    def network_input(self, z_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(input, time) of a network for z_t [B, ...] at native times t [B]."""
        return z_t, t

    def unit_time(self, t: jax.Array) -> jax.Array:
        """Native times [B] as places in [0, 1], f32."""
        return t / self.num_timesteps

    def native_time(self, u: float) -> float:
        """The native time of a place u in [0, 1], the inverse of `unit_time`; fractional."""
        return u * self.num_timesteps

    def training_time(self, u: jax.Array) -> jax.Array:
        """The native times [B] that training sees for draws u [B] in [0, 1], int32."""
        last = self.num_timesteps
        return jnp.clip(jnp.floor(u * last).astype(jnp.int32), 0, last - 1)

    def _log_ratio(self) -> np.ndarray:
        return np.log(self.sigma) - np.log(self.alpha)


class Path(NamedTuple):
    """From data to noise in t in [0, 1]."""

    at: Callable[[Any, Any], tuple[Any, Any, Any, Any]]
    """(t, numpy or jax.numpy) -> alpha, sigma and their derivatives by t."""

    time_of_ratio: Callable[[np.ndarray], np.ndarray]  # t at which sigma / alpha is that


@dataclass(frozen=True, eq=False)
class PathProcess:
    """A path in t in [0, 1] that ends on noise alone."""

    config: ProcessConfig
    path: Path

    discrete: ClassVar[bool] = False
    num_timesteps: ClassVar[int] = 0
    variance_exploding: ClassVar[bool] = False
    ends_on_noise: ClassVar[bool] = True
    data_time: ClassVar[float] = 0
    noise_time: ClassVar[float] = 1.0

    def coefficients(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma), traced, at native times t."""
        return self.path.at(t, jnp)[:2]

    def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(d alpha / dt, d sigma / dt) at native times t, traced."""
        return self.path.at(t, jnp)[2:]

    def host_coefficients(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) f64 at native times t."""
        return self.path.at(np.asarray(t, np.float64), np)[:2]

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The native time f64 at which sigma / alpha is `ratio`."""
        return self.path.time_of_ratio(np.asarray(ratio, np.float64))

    def network_input(self, z_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(input, time) of a network for z_t [B, ...] at native times t [B]: z_t and 1000 t."""
        return z_t, TIME_SCALE * t

    def unit_time(self, t: jax.Array) -> jax.Array:
        """Native times [B] as places in [0, 1]: themselves."""
        return t

    def native_time(self, u: float) -> float:
        """The native time of a place u in [0, 1]: itself."""
        return u

    def training_time(self, u: jax.Array) -> jax.Array:
        """The native times [B] that training sees for draws u [B] in [0, 1]."""
        return jnp.clip(u, 0, 1)


@dataclass(frozen=True, eq=False)
class SigmaProcess:
    """Noise added to unscaled data, whose sigma is the time (EDM, section 3)."""

    config: ProcessConfig

    discrete: ClassVar[bool] = False
    num_timesteps: ClassVar[int] = 0
    variance_exploding: ClassVar[bool] = True
    ends_on_noise: ClassVar[bool] = False
    data_time: ClassVar[float] = 0

    @property
    def noise_time(self) -> float:
        """Where sampling begins."""
        return self.config.sigma_max

    def ratio_range(self) -> tuple[float, float]:
        """sigma / alpha at the data end and at the noise end."""
        return self.config.sigma_min, self.config.sigma_max

    def coefficients(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma), traced, at native times t."""
        return jnp.ones_like(t), t

    def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(d alpha / dt, d sigma / dt) at native times t, traced."""
        return jnp.zeros_like(t), jnp.ones_like(t)

    def host_coefficients(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, sigma) f64 at native times t."""
        sigma = np.asarray(t, np.float64)
        return np.ones_like(sigma), sigma

    def time_of_ratio(self, ratio: np.ndarray) -> np.ndarray:
        """The native time f64 at which sigma / alpha is `ratio`: itself."""
        return np.asarray(ratio, np.float64)

    def network_input(self, z_t: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(input, time) of a network for z_t [B, ...] at native times t [B].

        z_t over its standard deviation, and ln(sigma) / 4 (EDM, table 1: c_in and c_noise).
        """
        scale = (self.config.sigma_data**2 + t**2) ** -0.5
        return rows(scale, z_t) * z_t, jnp.log(t) / 4

    def unit_time(self, t: jax.Array) -> jax.Array:
        """Native times [B] as places in [0, 1], f32, by the logarithm; clipped to the range."""
        low, high = self._log_range()
        return jnp.clip((jnp.log(t) - low) / (high - low), 0.0, 1.0)

    def native_time(self, u: float) -> float:
        """The native time of a place u in [0, 1], the inverse of `unit_time`."""
        return self.config.sigma_min ** (1 - u) * self.config.sigma_max**u

    def training_time(self, u: jax.Array) -> jax.Array:
        """The native times [B] that training sees for draws u [B] in [0, 1]: even in ln(sigma)."""
        low, high = self._log_range()
        return jnp.exp(low + u * (high - low))

    def _log_range(self) -> tuple[float, float]:
        return np.log(self.config.sigma_min), np.log(self.config.sigma_max)


Process = TableProcess | PathProcess | SigmaProcess


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


def zero_terminal_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """alpha_bar [T] moved to end on 0 and stretched to keep its first (Lin et al. 2023, alg. 1)."""
    alpha = np.sqrt(alpha_bar)
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def flow(t: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """(alpha, sigma) and their derivatives on the straight path (rectified flow)."""
    return 1 - t, t, -xp.ones_like(t), xp.ones_like(t)


def flow_cosine(t: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """The same on the circle, alpha = cos(pi t / 2): SiT's generalised variance preserving path."""
    quarter = np.pi / 2
    # A sine of the rest is exactly 0 at t = 1, where a rounded cosine is not.
    alpha, sigma = xp.sin(quarter * (1 - t)), xp.sin(quarter * t)
    return alpha, sigma, -quarter * sigma, quarter * alpha


TABLES: dict[str, Callable[[ProcessConfig], np.ndarray]] = {
    "ldm_linear": ldm_linear,
    "ddpm_linear": ddpm_linear,
    "cosine": cosine,
}
PATHS: dict[str, Path] = {
    "flow": Path(flow, lambda ratio: ratio / (1 + ratio)),
    "flow_cosine": Path(flow_cosine, lambda ratio: np.arctan(ratio) * 2 / np.pi),
}


def _table_process(config: ProcessConfig) -> TableProcess:
    alpha_bar = TABLES[config.kind](config)
    return TableProcess(
        config, zero_terminal_snr(alpha_bar) if config.zero_terminal_snr else alpha_bar
    )


def _path_process(config: ProcessConfig) -> PathProcess:
    return PathProcess(config, PATHS[config.kind])


KINDS: dict[str, Callable[[ProcessConfig], Process]] = {
    **dict.fromkeys(TABLES, _table_process),
    **dict.fromkeys(PATHS, _path_process),
    "edm": SigmaProcess,
}


def make_process(config: ProcessConfig) -> Process:
    """The process a config describes; raises InputError for a field outside its range."""
    kind, num_timesteps = config.kind, config.num_timesteps
    choose("process kind", kind, KINDS)
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise InputError(
            f"num_timesteps {num_timesteps!r} must be a whole number of at least 1; LDM uses 1000"
        )
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise InputError(
            f"beta_start {config.beta_start} and beta_end {config.beta_end} must satisfy "
            "0 < beta_start <= beta_end < 1; LDM uses 0.0015 and 0.0195"
        )
    within("sigma_data", config.sigma_data, "(0, inf)", "whitened latents: 1")
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
    return KINDS[kind](config)


def at_network(process: Process, network: Denoiser) -> Denoiser:
    """The denoiser, at native times, that a network makes (see `network_input`)."""

    def denoiser(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        return network(*process.network_input(z_t, t), cond)

    return denoiser


def corrupt(process: Process, z0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """z_t [B, ...] from z0 and standard normal noise [B, ...] at times t [B] (DDPM eq. 4)."""
    alpha, sigma = process.coefficients(t)
    return rows(alpha, z0) * z0 + rows(sigma, z0) * noise


def rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """values [B] shaped [B, 1, ...] to scale an array like `like` [B, ...], in its precision."""
    assert values.shape == like.shape[:1], f"{values.shape} must be [B] for an array {like.shape}"
    values = values.astype(jnp.promote_types(like.dtype, jnp.float32))
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def example_means(x: jax.Array, channel_weights: ArrayLike | None = None) -> jax.Array:
    """Means [B] of x [B, ..., C], with weights [C] those of the channels weighed by them."""
    if channel_weights is not None:
        x = x * over_channels(channel_weights, x)
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def over_channels(weights: ArrayLike, like: jax.Array) -> jax.Array:
    """Weights [C] over their mean, shaped [1, ..., C] to scale an array like `like`."""
    weights = jnp.asarray(weights, like.dtype)
    return (weights / weights.mean()).reshape((1,) * (like.ndim - 1) + (-1,))
