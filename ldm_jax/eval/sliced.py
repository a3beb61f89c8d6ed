"""Sliced Wasserstein distance: sets of features [N,D] compared along random directions, f64."""

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import blocks, checked_pair

DIRECTIONS = 1000
COLUMNS, ROWS = 32, 4096  # directions and images at a time: of 50 000 images 13 MB


def sliced_distance(
    first: np.ndarray, second: np.ndarray, seed: int, *, directions: int = DIRECTIONS
) -> float:
    """Mean over random unit directions of the squared 2-Wasserstein distance of the projections.

    Between equal numbers of points that is the mean square of the differences of the sorted values;
    of the larger set a random subset is taken. Biased upwards by roughly 1/N, so compare figures of
    equal N only. Bonneel et al., J. Mathematical Imaging and Vision 51 (2015).
    """
    first, second = checked_pair(first, second)
    if directions < 1:
        raise InputError(f"{directions} directions: the rule is 1 or more; leave it out")
    rng = np.random.default_rng(seed)
    least = min(len(first), len(second))
    first, second = (
        x if len(x) == least else x[np.sort(rng.permutation(len(x))[:least])]
        for x in (first, second)
    )
    units = rng.normal(size=(directions, first.shape[1]))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    total = 0.0
    for part in blocks(directions, COLUMNS):
        a, b = (np.sort(_project(x, units[part]), axis=1) for x in (first, second))
        total += np.square(a - b).mean(1).sum()
    return float(total / directions)


def mind(
    first: np.ndarray, second: np.ndarray, seed: int = 2020, *, directions: int = DIRECTIONS
) -> float:
    """MIND: 3 D times the sliced distance. Berthet et al., "Monge Inception Distance" (2026).

    The directions are not those of torch-fidelity, whose generator is torch's.
    """
    scale = 3.0 * np.shape(first)[-1]
    return scale * sliced_distance(first, second, seed, directions=directions)


def _project(x, units):
    """[N,D], [K,D] -> [K,N] in f64, without an f64 copy of all of x."""
    parts = [units @ x[rows].astype(np.float64).T for rows in blocks(len(x), ROWS)]
    return np.concatenate(parts, axis=1)
