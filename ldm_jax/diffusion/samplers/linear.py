"""Samplers whose step is one linear combination: of the state, of predictions and of noise."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.parameterisation import Predict
from ldm_jax.diffusion.samplers import loop


@dataclass(frozen=True, eq=False)
class Plan:
    """Coefficients of S steps, f64; the predictions are newest first, K of them."""

    of_z: np.ndarray  # [S]
    of_x0: np.ndarray  # [S, K]
    of_eps: np.ndarray  # [S, K]
    of_noise: np.ndarray  # [S]
    of_v: np.ndarray  # [S], of (1 + v) / 2 in the logarithm of what a learned v makes of of_noise


def walk(
    predict: Predict,
    grid: Grid,
    plan: Plan,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    **options: Any,
) -> Any:
    """Takes the plan's steps; what a column of zeros would multiply is not computed."""
    used = {name: bool(np.any(value)) for name, value in vars(plan).items()}
    depth = plan.of_x0.shape[1] - 1
    past = jnp.zeros((depth, *z_T.shape), loop.as_state(z_T).dtype)

    def body(z_t: jax.Array, memory: Any, step: loop.Step, c: Any) -> tuple:
        x0, eps, *v = predict(z_t, loop.at(step.t, z_t), cond)
        terms, remembered = [], []
        if used["of_z"]:
            terms.append(c["of_z"] * z_t)
        for name, now, before in zip(("of_x0", "of_eps"), (x0, eps), memory, strict=True):
            if not used[name]:
                remembered.append(before)
                continue
            recent = jnp.concatenate([now[None], before])
            terms += [c[name][k] * recent[k] for k in range(depth + 1)]
            remembered.append(recent[:depth])
        if used["of_noise"]:
            noise = loop.step_noise(keys, step.index, z_t)
            learned = jnp.exp(c["of_v"] * (1 + v[0]) / 2) if v and used["of_v"] else 1.0
            terms.append(temperature * c["of_noise"] * learned * noise)
        return jnp.asarray(sum(terms), z_t.dtype), x0, tuple(remembered)

    return loop.scan(body, grid.starts, z_T, keys, (past, past), vars(plan), **options)


def plan(
    grid: Grid,
    *,
    of_z: Any = 0.0,
    of_x0: Any = 0.0,
    of_eps: Any = 0.0,
    of_noise: Any = 0.0,
    of_v: Any = 0.0,
) -> Plan:
    """A plan from columns [S], or scalars for all steps; of_x0 and of_eps may have [S, K]."""
    columns = [np.asarray(c, np.float64) for c in (of_z, of_x0, of_eps, of_noise, of_v)]
    count = grid.num_steps
    depth = max([1, *(c.shape[1] for c in columns if c.ndim == 2)])

    def column(c: np.ndarray) -> np.ndarray:
        return np.broadcast_to(c, (count,))

    def table(c: np.ndarray) -> np.ndarray:
        if c.ndim == 2:
            return c
        return np.concatenate([column(c)[:, None], np.zeros((count, depth - 1))], axis=1)

    of_z, of_x0, of_eps, of_noise, of_v = columns
    return Plan(column(of_z), table(of_x0), table(of_eps), column(of_noise), column(of_v))
