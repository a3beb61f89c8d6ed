"""UniPC: a multistep predictor, and a corrector that reuses the next step's evaluation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.parameterisation import Predict
from ldm_jax.diffusion.samplers import loop
from ldm_jax.errors import InputError


def unipc(
    predict: Predict,
    grid: Grid,
    z_T: jax.Array,
    cond: Any,
    keys: jax.Array,
    *,
    order: int = 2,
    **options: Any,
) -> Any:
    """z0 by UniPC in data prediction with B(h) = e^h - 1, one evaluation a step.

    With the corrector, `order` p converges with p + 1; the first steps and the last have less.
    Raises InputError for an order other than 1, 2, 3.
    """
    if order not in (1, 2, 3):
        raise InputError(f"order {order} must be 1, 2 or 3; 2 suits guided sampling")
    coefficients = _coefficients(grid, order)
    state = loop.as_state(z_T)
    memory = (state, jnp.zeros((order, *state.shape), state.dtype))

    def body(z_t: jax.Array, memory: Any, step: loop.Step, c: Any) -> tuple:
        before, past = memory
        x0, *_ = predict(z_t, loop.at(step.t, z_t), cond)
        recent = jnp.concatenate([x0[None], past])

        def combine(weights: jax.Array) -> Any:
            return sum(weights[k] * recent[k] for k in range(order + 1))

        z_t = c["keep"] * z_t + c["of_before"] * before + combine(c["correct"])
        onward = c["of_z"] * z_t + combine(c["predict"])
        return onward, x0, (z_t, recent[:order])

    return loop.scan(body, grid.starts, z_T, keys, memory, coefficients, **options)


def _coefficients(grid: Grid, order: int) -> dict[str, np.ndarray]:
    """For S steps: the corrector of the step before, then the predictor; x0 newest first."""
    count, lam = grid.num_steps, grid.log_ratio
    stretch = grid.sigma[1:] / grid.sigma[:-1]
    correct, ahead = np.zeros((count, order + 1)), np.zeros((count, order + 1))
    for i in range(count):
        usable = i + 1 - int(np.isinf(lam[:i]).sum())
        p = min(order, usable, count - i)
        h = lam[i + 1] - lam[i]
        ratios = (lam[i - np.arange(1, p)] - lam[i]) / h
        ahead[i, :p] = -grid.alpha[i + 1] * _differences(h, ratios, corrector=False)
        if i + 1 < count:
            weights = _differences(h, ratios, corrector=True)
            correct[i + 1, : p + 1] = -grid.alpha[i + 1] * weights
    first = np.arange(count) == 0
    return {
        "keep": first.astype(float),
        "of_before": np.where(first, 0, np.r_[0, stretch[:-1]]),
        "correct": correct,
        "of_z": stretch,
        "predict": ahead,
    }


def _differences(h: float, ratios: np.ndarray, *, corrector: bool) -> np.ndarray:
    """Weights of x0 at [the end, for a corrector], this step's start and the starts before it.

    expm1(-h) (x0 + sum rho_k (x0_k - x0) / r_k), where the r_k are `ratios`, and 1 at the end.
    """
    scale = np.expm1(-h)
    r = np.append(ratios, 1.0) if corrector else ratios
    if len(r) == 0:
        return np.array([scale])
    # The published simplifications, which keep the order.
    rho = np.full(1, 0.5) if len(r) == 1 else _solve(h, r)
    change = scale * rho / r
    weights = np.concatenate([[scale - change.sum()], change])
    # rho's last belongs to the end of the step, which is the newest prediction.
    return np.concatenate([weights[-1:], weights[:-1]]) if corrector else weights


def _solve(h: float, r: np.ndarray) -> np.ndarray:
    """rho with sum_k rho_k r_k^(n-1) = n! phi_(n+1)(-h) h / B for n = 1 .. len(r) (UniPC eq. 5)."""
    phi, b = np.expm1(-h) / -h, []
    for n in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(n)) / -h
        b.append(math.factorial(n) * phi * -h / np.expm1(-h))
    return np.linalg.solve(np.vander(r, increasing=True).T, np.array(b))
