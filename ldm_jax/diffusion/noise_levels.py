"""How often training sees each noise level: draws of the native time, row i from keys[i]."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.process import Process
from ldm_jax.errors import InputError


@dataclass(frozen=True)
class NoiseLevels:
    draw: str = "uniform"  # a name in DRAWS
    mean: float = 0.0  # of logit_normal's logit, of log_normal's ln(sigma); EDM: -1.2
    std: float = 1.0  # the same; EDM: 1.2
    mode_scale: float = 1.29  # of mode; 0 is uniform, more favours the middle
    shift: float = 1.0  # t' = a t / (1 + (a - 1) t): above 1 favours noise; 1 = none

    def __post_init__(self):
        if self.draw not in DRAWS:
            raise InputError(f"draw {self.draw!r} is unknown; choose one of {list(DRAWS)}")
        if not 0 < self.std < np.inf:
            raise InputError(f"std {self.std} must be positive; SD3 uses 1, EDM 1.2")
        # Beyond these bounds mode's map from u to t is not monotonic.
        if not -1 <= self.mode_scale <= 2 / (np.pi - 2):
            raise InputError(f"mode_scale {self.mode_scale} must be in -1..1.75; SD3 uses 1.29")
        if not 0 < self.shift < np.inf:
            raise InputError(f"shift {self.shift} must be positive; 1 = none")


def uniform(config: NoiseLevels, key: jax.Array) -> jax.Array:
    """u [] in [0, 1)."""
    return jax.random.uniform(key)


def logit_normal(config: NoiseLevels, key: jax.Array) -> jax.Array:
    """A normal draw through the sigmoid (SD3 eq. 19)."""
    return jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key))


def mode(config: NoiseLevels, key: jax.Array) -> jax.Array:
    """A density with its mode in the middle (SD3 eq. 20)."""
    u = jax.random.uniform(key)
    return 1 - u - config.mode_scale * (jnp.cos(np.pi / 2 * u) ** 2 - 1 + u)


def log_normal(config: NoiseLevels, key: jax.Array) -> jax.Array:
    """ln(sigma) of edm is normal (EDM, table 1)."""
    return jnp.exp(config.mean + config.std * jax.random.normal(key))


DRAWS: dict[str, Callable[[NoiseLevels, jax.Array], jax.Array]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "log_normal": log_normal,
}


def check(process: Process, config: NoiseLevels) -> None:
    """Raises InputError for a draw that does not fit the process."""
    kind = process.config.kind
    if config.draw == "log_normal" and kind != "edm":
        raise InputError(
            f"draw 'log_normal' is of sigma, for 'edm', not {kind!r}; try logit_normal"
        )
    if config.draw == "log_normal" and config.shift != 1:
        raise InputError(f"shift {config.shift}: 'log_normal' has none; set shift=1 or its mean")


def shifted(t: jax.Array | np.ndarray, shift: float) -> jax.Array | np.ndarray:
    """t in [0, 1] moved to the noise end by shift > 1 (SD3 eq. 23, where t = 1 is noise too)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(process: Process, config: NoiseLevels, keys: jax.Array) -> jax.Array:
    """Native times [B]: int32 timesteps or f32. Uniform on edm is uniform in ln(sigma)."""
    check(process, config)
    last = process.num_timesteps
    if process.discrete and config.draw == "uniform" and config.shift == 1:
        return uniform_timesteps(keys, last)
    u = jax.vmap(lambda key: DRAWS[config.draw](config, key))(keys)
    if config.draw == "log_normal":
        return u
    u = jnp.asarray(shifted(u, config.shift))
    if process.discrete:
        return jnp.clip(jnp.floor(u * last).astype(jnp.int32), 0, last - 1)
    if process.config.kind == "edm":
        low, high = np.log(process.config.sigma_min), np.log(process.config.sigma_max)
        return jnp.exp(low + u * (high - low))
    return jnp.clip(u, 0, 1)


def uniform_timesteps(keys: jax.Array, num_timesteps: int) -> jax.Array:
    """t [B] int32, uniform on 0..num_timesteps-1, row i drawn from keys[i]; 0 is the data end."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps, jnp.int32))(keys)
