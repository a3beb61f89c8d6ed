"""Averages of the parameters, f32: exponential ones, and power functions of any width.

They stand in `TrainState.averages` by name: "ema" is the main one, with the warm-up of the
published models; "ema-0.999" is of another decay and "ema-power-0.05" of a width.

The power-function average of width sigma_rel at step t weighs the parameters of step tau by the
profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), on [0, t] (EDM2, eqs. 8 and 9): the older,
the less, with a spread that is the share sigma_rel of the whole training. Any width is made of
snapshots after the fact, in f64 on the host (`coefficients`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError, within

MAIN = "ema"
POWER = "ema-power-"  # before the width, in the names of power-function averages


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.9999  # 0 = keep no average
    warmup: bool = True  # decay at most (1 + n) / (10 + n) at update n = 1, 2, ...
    more: tuple[float, ...] = ()  # further decays, an average for each
    power: tuple[float, ...] = ()  # widths of power-function averages, as (0.05, 0.1)
    snapshot_every: int = 0  # steps between snapshots of those, for `ldm ema`; 0 = none

    def __post_init__(self):
        within("ema decay", self.decay, "[0, 1)", "0 keeps no average")
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
    """Of all averages, the main one first."""
    main = [MAIN] if config.decay else []
    return main + [f"ema-{d:g}" for d in config.more] + [power_name(w) for w in config.power]


def power_name(width: float) -> str:
    return f"{POWER}{width:g}"


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
    config: EmaConfig, averages: dict[str, Any], params: Any, n: jax.Array | int
) -> dict[str, Any]:
    """The averages after update n, which led to `params`; the first is n = 1."""
    new = {}
    for name, decay in zip(average_names(config), _decays(config), strict=False):
        one = dataclasses.replace(config, decay=decay)
        new[name] = update(averages[name], params, decay_at(one, n))
    for width in config.power:
        name = power_name(width)
        new[name] = blend(averages[name], params, power_weight(gamma_of(width), n))
    return new


def _decays(config: EmaConfig) -> tuple[float, ...]:
    return ((config.decay,) if config.decay else ()) + config.more


WIDEST = 12**-0.5  # gamma 0: the plain mean of all steps


def gamma_of(width: float) -> float:
    """The exponent of a profile of width sigma_rel in (0, WIDEST]; InputError outside of it.

    sigma_rel is the standard deviation of the profile as a share of t (EDM2, eq. 10).
    """
    if not 0 < width <= WIDEST + 1e-12:
        raise InputError(
            f"ema width {width} must be in (0, {WIDEST:.4f}]: it is a share of the training, 0.05 "
            "to 0.25 is usual"
        )
    inverse = width**-2
    # EDM2, eq. 129: the one root that is not negative.
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def inner(
    gamma_a: np.ndarray | float,
    t_a: np.ndarray | float,
    gamma_b: np.ndarray | float,
    t_b: np.ndarray | float,
) -> np.ndarray:
    """The integral of the product of two profiles, elementwise (EDM2, algorithm 3).

    With m the earlier of both ends: (a+1)(b+1)/(a+b+1) (m/t_a)^a (m/t_b)^b m / (t_a t_b).
    """
    m = np.minimum(t_a, t_b)
    size = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(size * (m / t_a) ** gamma_a * (m / t_b) ** gamma_b * m / (t_a * t_b))


def coefficients(
    kept: Sequence[tuple[int, float]], step: int, width: float
) -> tuple[np.ndarray, float]:
    """What to multiply kept averages (step, width) by, f64 [n], to get the one of (step, width).

    Their profiles come closest to the wanted one in the mean square; the sum is 1 (EDM2, section
    3.2). Also the error of that: the norm of what is left, as a share of the wanted profile's.
    """
    gammas = np.array([gamma_of(w) for _, w in kept])
    ends = np.array([float(s) for s, _ in kept])
    gamma, end = gamma_of(width), float(step)
    gram = inner(gammas[:, None], ends[:, None], gammas[None], ends[None])
    wanted = inner(gammas, ends, gamma, end)
    # Of profiles of norm 1: neighbours are nearly parallel, and their sizes need not make it worse.
    unit = 1 / np.sqrt(np.diag(gram))
    solved, *_ = np.linalg.lstsq(gram * unit[:, None] * unit, wanted * unit, rcond=None)
    x = solved * unit
    x /= x.sum()
    square = float(inner(gamma, end, gamma, end))
    left = square - 2 * float(x @ wanted) + float(x @ gram @ x)
    return x, float(np.sqrt(max(left, 0.0) / square))
