"""How often training sees each noise level: draws of the native time, row i from keys[i]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from ldm_jax.diffusion.process import Process, SigmaProcess
from ldm_jax.errors import InputError, choose, within


@dataclass(frozen=True)
class NoiseLevels:
    draw: str = "uniform"  # a name in DRAWS
    mean: float = 0.0  # of logit_normal's logit, of log_normal's ln(sigma); EDM: -1.2
    std: float = 1.0  # the same; EDM: 1.2
    mode_scale: float = 1.29  # of mode; 0 is uniform, more favours the middle
    shift: float = 1.0  # t' = a t / (1 + (a - 1) t): above 1 favours noise; 1 = none

    def __post_init__(self):
        choose("draw", self.draw, DRAWS)
        within("std", self.std, "(0, inf)", "SD3 uses 1, EDM 1.2")
        # Beyond these bounds mode's map from u to t is not monotonic.
        if not -1 <= self.mode_scale <= 2 / (np.pi - 2):
            raise InputError(f"mode_scale {self.mode_scale} must be in -1..1.75; SD3 uses 1.29")
        within("shift", self.shift, "(0, inf)", "1 = none")


class Standard(NamedTuple):
    """A law without parameters."""

    draw: Callable[[jax.Array], jax.Array]  # key -> []
    quantile: Callable[[jax.Array], jax.Array]  # the value below which a share u of draws lies


UNIFORM = Standard(jax.random.uniform, lambda u: u)
NORMAL = Standard(jax.random.normal, ndtri)


def uniform(config: NoiseLevels, u: jax.Array) -> jax.Array:
    """u in [0, 1)."""
    return u


def logit_normal(config: NoiseLevels, x: jax.Array) -> jax.Array:
    """A normal draw through the sigmoid (SD3 eq. 19)."""
    return jax.nn.sigmoid(config.mean + config.std * x)


def mode(config: NoiseLevels, u: jax.Array) -> jax.Array:
    """A density with its mode in the middle (SD3 eq. 20)."""
    return 1 - u - config.mode_scale * (jnp.cos(np.pi / 2 * u) ** 2 - 1 + u)


def log_normal(config: NoiseLevels, x: jax.Array) -> jax.Array:
    """ln(sigma) of edm is normal (EDM, table 1)."""
    return jnp.exp(config.mean + config.std * x)


DRAWS: dict[str, tuple[Standard, Callable[[NoiseLevels, jax.Array], jax.Array]]] = {
    "uniform": (UNIFORM, uniform),
    "logit_normal": (NORMAL, logit_normal),
    "mode": (UNIFORM, mode),
    "log_normal": (NORMAL, log_normal),
}
"""A draw is a function of one by a standard law."""


def check(process: Process, config: NoiseLevels) -> None:
    """Raises InputError for a draw that does not fit the process."""
    if config.draw == "log_normal" and not isinstance(process, SigmaProcess):
        raise InputError(
            f"draw 'log_normal' is of sigma, for 'edm', not {process.config.kind!r}; "
            "try logit_normal"
        )
    if config.draw == "log_normal" and config.shift != 1:
        raise InputError(f"shift {config.shift}: 'log_normal' has none; set shift=1 or its mean")


def shifted(t: jax.Array | np.ndarray, shift: float) -> jax.Array | np.ndarray:
    """t in [0, 1] moved to the noise end by shift > 1 (SD3 eq. 23, where t = 1 is noise too)."""
    return shift * t / (1 + (shift - 1) * t)


def draw_times(process: Process, config: NoiseLevels, keys: jax.Array) -> jax.Array:
    """Native times [B], int32 timesteps or f32, of a draw that `check` lets pass."""
    if process.discrete and config.draw == "uniform" and config.shift == 1:
        return uniform_timesteps(keys, process.num_timesteps)
    standard, drawn = DRAWS[config.draw]
    u = jax.vmap(lambda key: drawn(config, standard.draw(key)))(keys)
    return _native(process, config, u)


def quantile_times(process: Process, config: NoiseLevels, u: jax.Array) -> jax.Array:
    """What `draw_times` gives, but for quantiles u [N] in (0, 1) of its standard draws.

    Even u give times of the draw's distribution without a draw; in which order is the draw's.
    """
    standard, drawn = DRAWS[config.draw]
    return _native(process, config, drawn(config, standard.quantile(u)))


def _native(process: Process, config: NoiseLevels, u: jax.Array) -> jax.Array:
    if config.draw == "log_normal":
        return u
    return process.training_time(jnp.asarray(shifted(u, config.shift)))


def uniform_timesteps(keys: jax.Array, num_timesteps: int) -> jax.Array:
    """t [B] int32, uniform on 0..num_timesteps-1, row i drawn from keys[i]; 0 is the data end."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_timesteps, jnp.int32))(keys)
