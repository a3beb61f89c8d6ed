"""Exponential moving average of the parameters, f32, with the warm-up of the published models."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    decay: float = 0.9999  # 0 = keep no average
    warmup: bool = True  # decay at most (1 + n) / (10 + n) at update n = 1, 2, ...

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise InputError(f"ema decay {self.decay} must be in [0, 1); 0 keeps no average")


def decay_at(config: Config, n: jax.Array | int) -> jax.Array:
    """The decay of update n (the first is n = 1), f32 []."""
    n = jnp.asarray(n, jnp.float32)
    decay = jnp.float32(config.decay)
    return jnp.minimum(decay, (1 + n) / (10 + n)) if config.warmup else decay


def update(ema: Any, params: Any, decay: jax.Array) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)
