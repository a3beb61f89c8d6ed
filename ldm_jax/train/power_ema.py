"""Power-function averages: widths, profiles, and any width after the fact, in f64 on the host.

The average of width sigma_rel at step t weighs the parameters of step tau by the profile
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), on [0, t] (EDM2, eqs. 8 and 9): the older, the
less, with a spread that is the share sigma_rel of the whole training.
"""

from collections.abc import Sequence

import numpy as np

from ldm_jax.errors import InputError

WIDEST = 12**-0.5  # gamma 0: the plain mean of all steps


def width_of(gamma: float) -> float:
    """sigma_rel, the standard deviation of the profile as a share of t (EDM2, eq. 10)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def gamma_of(width: float) -> float:
    """The exponent of a profile of width sigma_rel in (0, WIDEST]; InputError outside of it."""
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
