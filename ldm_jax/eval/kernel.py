"""Distances between two sets of features by kernels: KID and CMMD, f64, in blocks of rows."""

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import BLOCK, blocks, checked_pair

SIGMA, SCALE = 10.0, 1000.0  # of CMMD; published figures are of these


def kid(
    first: np.ndarray,
    second: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> tuple[float, float]:
    """Kernel distance of features [N,D], [M,D]: (mean, standard deviation) over random subsets.

    Each is an unbiased estimate, so it may fall below 0; publications report 1000 times the mean.
    The subsets are those that torch-fidelity draws from this seed. Binkowski et al., ICLR 2018,
    eq. 4 with the cubic kernel. Raises InputError for sets smaller than a subset.
    """
    first, second = checked_pair(first, second)
    least = min(len(first), len(second))
    if not 2 <= subset_size <= least or subsets < 1:
        raise InputError(
            f"{subsets} subsets of {subset_size} images from sets of {len(first)} and "
            f"{len(second)}: the rule is 1 subset or more, of 2 to {least} images; take more "
            "images or smaller subsets"
        )
    rng = np.random.RandomState(seed)  # the generator of the reference
    draws = []
    for _ in range(subsets):
        x = first[rng.choice(len(first), subset_size, replace=False)]
        y = second[rng.choice(len(second), subset_size, replace=False)]
        draws.append(unbiased(x, y))
    return float(np.mean(draws)), float(np.std(draws))


def unbiased(x: np.ndarray, y: np.ndarray, block: int = BLOCK) -> float:
    """The unbiased kernel distance from all pairs of rows of x [N,D] and y [M,D]."""
    n, m = len(x), len(y)
    within = (_sum(_cubic, x, block) - _diagonal(x, block)) / (n * (n - 1))
    within += (_sum(_cubic, y, block) - _diagonal(y, block)) / (m * (m - 1))
    return float(within - 2 * _cross_sum(_cubic, x, y, block) / (n * m))


def cmmd(first: np.ndarray, second: np.ndarray, *, block: int = BLOCK) -> float:
    """CMMD of CLIP embeddings [N,D], [M,D]: 1000 times the biased squared MMD, 0 for equal sets.

    Embeddings are normalised to length 1; Gaussian kernel of width 10. At that width it is close to
    10 |difference of the mean embeddings|^2. Jayasumana et al., CVPR 2024, section 4.
    """
    first, second = (_unit(x) for x in checked_pair(first, second))
    n, m = len(first), len(second)
    # Means of k - 1, whose ones cancel in the sum: k itself differs from 1 by less than 0.02.
    within = _sum(_gaussian_less_one, first, block) / n**2
    within += _sum(_gaussian_less_one, second, block) / m**2
    across = _cross_sum(_gaussian_less_one, first, second, block) / (n * m)
    return float(SCALE * (within - 2 * across))


def _sum(kernel, x, block) -> float:
    """Over all ordered pairs of rows of x; tiles above the diagonal count twice."""
    total = 0.0
    for rows in blocks(len(x), block):
        a = x[rows].astype(np.float64)
        for columns in blocks(len(x), block):
            if columns.start >= rows.start:
                tile = kernel(a, x[columns].astype(np.float64)).sum()
                total += tile if columns == rows else 2 * tile
    return total


def _cross_sum(kernel, x, y, block) -> float:
    total = 0.0
    for rows in blocks(len(x), block):
        a = x[rows].astype(np.float64)
        for columns in blocks(len(y), block):
            total += kernel(a, y[columns].astype(np.float64)).sum()
    return total


def _diagonal(x, block) -> float:
    """The cubic kernel's sum over the pairs of a row with itself."""
    return sum(
        float((((x[rows].astype(np.float64) ** 2).mean(1) + 1) ** 3).sum())
        for rows in blocks(len(x), block)
    )


def _cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _gaussian_less_one(x, y):
    # |x - y|^2 = 2 - 2 x.y of unit vectors.
    return np.expm1((x @ y.T - 1) / SIGMA**2)


def _unit(x):
    x = x.astype(np.float64)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        raise InputError("an embedding is all 0 and has no direction; look at the network it is of")
    return x / norms
