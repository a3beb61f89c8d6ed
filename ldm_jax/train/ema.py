"""Exponential moving averages of the parameters, f32, with the warm-up of the published models.

One of them is the main average, `TrainState.ema`. Others stand beside it in
`TrainState.averages`, by name: "0.999" of a decay, "power-0.05" of a width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError
from ldm_jax.train.power_ema import gamma_of


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.9999  # 0 = keep no average
    warmup: bool = True  # decay at most (1 + n) / (10 + n) at update n = 1, 2, ...
    more: tuple[float, ...] = ()  # further decays, each an average of its own
    power: tuple[float, ...] = ()  # widths of power-function averages, as (0.05, 0.1)
    snapshot_every: int = 0  # steps between snapshots of those, for `ldm ema`; 0 = none

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"ema decay {self.decay} must be in [0, 1); 0 keeps no average")
        for decay in self.more:
            if not 0 < decay < 1:
                raise InputError(f"ema more {self.more}: {decay} must be in (0, 1)")
        for width in self.power:
            gamma_of(width)
        names = average_names(self)
        if len(set(names)) < len(names):
            raise InputError(f"ema averages {names} must differ; leave out the doubles")
        if self.snapshot_every < 0 or (self.snapshot_every and not self.power):
            raise InputError(
                f"ema snapshot_every {self.snapshot_every} must be at least 0, and 0 without ema "
                "power: snapshots are of power-function averages; set ema.power=(0.05, 0.1)"
            )


def average_names(config: EmaConfig) -> list[str]:
    """Of the averages beside the main one."""
    return [f"{d:g}" for d in config.more] + [power_name(width) for width in config.power]


def power_name(width: float) -> str:
    return f"power-{width:g}"


def decay_at(config: EmaConfig, n: jax.Array | int) -> jax.Array:
    """The decay of update n (the first is n = 1), f32 []."""
    n = jnp.asarray(n, jnp.float32)
    decay = jnp.float32(config.decay)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if config.warmup else decay


def update(ema: Any, params: Any, decay: jax.Array) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return blend(ema, params, 1 - decay)


def blend(average: Any, params: Any, weight: jax.Array) -> Any:
    """average + weight (params - average), leaf by leaf."""
    return jax.tree.map(lambda a, p: a + weight * (p - a), average, params)


def power_weight(gamma: float, n: jax.Array | int) -> jax.Array:
    """1 - (1 - 1/n)^(gamma + 1), f32 []: what update n takes of the parameters; all at n = 1.

    EDM2, eq. 127, with n in steps: the batch size is constant.
    """
    # Taken from 1 in f32 it would have no correct digits after some million steps.
    return -jnp.expm1((gamma + 1) * jnp.log1p(-1 / jnp.asarray(n, jnp.float32)))


def advance(
    config: EmaConfig, main: Any, averages: dict[str, Any], params: Any, n: jax.Array | int
) -> tuple[Any, dict[str, Any]]:
    """Both after update n, which led to `params`; the first is n = 1."""
    if config.decay:
        main = update(main, params, decay_at(config, n))
    new = {}
    for decay in config.more:
        name, one = f"{decay:g}", dataclasses.replace(config, decay=decay)
        new[name] = update(averages[name], params, decay_at(one, n))
    for width in config.power:
        name = power_name(width)
        new[name] = blend(averages[name], params, power_weight(gamma_of(width), n))
    return main, new
