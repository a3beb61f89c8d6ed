"""What the nearest neighbours of features say: precision, recall, density, coverage, copies.

Squared distances come in f64 from square tiles and are rounded to f32: two that are equal in exact
arithmetic, such as those of a copy and of its original, then compare as equal in any tile, but for
about one pair in a hundred thousand.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import BLOCK, blocks, checked_pair

# Squared distances below this share of the squared lengths are rounding: f32 features differ by
# 6e-8 of a value or not at all.
ROUNDING = 1e-13


def precision_recall(
    real: np.ndarray, fake: np.ndarray, *, k: int = 3, block: int = BLOCK
) -> tuple[float, float]:
    """(precision, recall) of features [N,D] and [M,D].

    Precision is the share of fakes inside the ball of any real image, recall the share of reals
    inside that of any fake; a ball reaches as far as its centre's k-th neighbour in its own set,
    its surface included. Both depend on N and M: the original compares equal numbers, ADM's
    evaluator 10 000 reals with 50 000 fakes, and in f16, so that its last digits differ.
    Kynkaanniemi et al., NeurIPS 2019, eq. 1-2. Raises InputError for sets of k images or fewer.
    """
    real, fake = _sets(real, fake, k)
    real_radii, fake_radii = _radii(real, k, block), _radii(fake, k, block)
    real_inside, fake_inside = np.zeros(len(real), bool), np.zeros(len(fake), bool)
    for rows, columns, d in _tiles(real, fake, block):
        fake_inside[columns] |= (d <= real_radii[rows, None]).any(0)
        real_inside[rows] |= (d <= fake_radii[None, columns]).any(1)
    return float(fake_inside.mean()), float(real_inside.mean())


def density_coverage(
    real: np.ndarray, fake: np.ndarray, *, k: int = 5, block: int = BLOCK
) -> tuple[float, float]:
    """(density, coverage) of features [N,D] and [M,D].

    Density is the mean number of real balls that a fake is in, over k, and may exceed 1; coverage
    the share of real balls with a fake in them. The surface of a ball is outside, as in the
    authors' `prdc`. Naeem et al., ICML 2020, eq. 3-4. Raises InputError for k real images or fewer.
    """
    real, fake = _sets(real, fake, k, of_both=False)
    radii = _radii(real, k, block)
    inside, covered = 0, np.zeros(len(real), bool)
    for rows, _, d in _tiles(real, fake, block):
        within = d < radii[rows, None]
        inside += np.count_nonzero(within)
        covered[rows] |= within.any(1)
    return float(inside / (k * len(fake))), float(covered.mean())


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """How near samples lie to training images, in units of how near those lie to each other."""

    nearest: np.ndarray  # [N], row of each sample's nearest training image
    ratio: np.ndarray  # [N], distance to it / from it to its own nearest training image
    copied: float  # share of samples with a ratio below the threshold
    repeated: float  # share of samples as near as that to another sample, in the same unit


def memorisation(
    samples: np.ndarray, training: np.ndarray, *, threshold: float = 1 / 3, block: int = BLOCK
) -> Memorisation:
    """Finds copies of training images and repetitions among samples, features [N,D] and [M,D].

    No other metric here penalises a copy: the training set itself has the best of all. A ratio
    near 1 is that of a new image of the same distribution; 0 is a copy. A training image that is
    there twice has no neighbour distance: its copy has ratio 0, anything else infinity. Raises
    InputError for fewer than two images in either set.
    """
    samples, training = checked_pair(samples, training, 2, ("sample", "training"))
    nearest, distance = _nearest(samples, training, block)
    centres, place = np.unique(nearest, return_inverse=True)
    _, spacing = _nearest(training[centres], training, block, skip=centres)
    _, apart = _nearest(samples, samples, block, skip=np.arange(len(samples)))
    ratio = _over(distance, spacing[place])
    repeated = (_over(apart, spacing[place]) < threshold).mean()
    return Memorisation(nearest, ratio, float((ratio < threshold).mean()), float(repeated))


def _over(distance, spacing):
    """distance / spacing, where 0 / 0 is 0: a copy of what is there twice is a copy."""
    ratio = np.where(distance > 0, np.inf, 0.0)
    return np.divide(distance, spacing, out=ratio, where=spacing > 0)


def _sets(real, fake, k, of_both=True):
    real, fake = checked_pair(real, fake, names=("real", "fake"))
    least = min(len(real), len(fake)) if of_both else len(real)
    if not 1 <= k < least:
        raise InputError(
            f"{k} neighbours of {len(real)} real and {len(fake)} fake images: the rule is 1 or "
            "more neighbours and more images than neighbours; take more images"
        )
    return real, fake


def _radii(x, k, block):
    """Squared distance of each row to its k-th nearest other row, f32 [N]."""
    best = np.full((len(x), k + 1), np.inf, np.float32)  # one more: a row is its own nearest
    for rows, _, d in _tiles(x, x, block):
        best[rows] = np.partition(np.concatenate([best[rows], d], axis=1), k, axis=1)[:, : k + 1]
    return best.max(1)


def _nearest(x, y, block, skip=None):
    """Row of y nearest to each row of x, except row skip[i], and the distance, f64 [N]."""
    index, best = np.zeros(len(x), np.int64), np.full(len(x), np.inf)
    for rows, columns, d in _tiles(x, y, block):
        if skip is not None:
            here = np.flatnonzero((skip[rows] >= columns.start) & (skip[rows] < columns.stop))
            d[here, skip[rows][here] - columns.start] = np.inf
        candidate = d.argmin(1)
        squared = d[np.arange(len(d)), candidate]
        nearer = squared < best[rows]
        index[rows] = np.where(nearer, columns.start + candidate, index[rows])
        best[rows] = np.where(nearer, squared, best[rows])
    # Again from the differences: the tiles' distances of near copies are differences of squares.
    distance = [
        np.linalg.norm(x[rows].astype(np.float64) - y[index[rows]].astype(np.float64), axis=1)
        for rows in blocks(len(x), block)
    ]
    return index, np.concatenate(distance)


def _tiles(x, y, block) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows, columns, squared distances f32 [rows,columns]) of all of x [N,D] against y [M,D]."""
    for rows in blocks(len(x), block):
        a = x[rows].astype(np.float64)
        a2 = np.einsum("nd,nd->n", a, a)[:, None]
        for columns in blocks(len(y), block):
            b = y[columns].astype(np.float64)
            lengths = a2 + np.einsum("nd,nd->n", b, b)[None]
            d = a @ b.T
            d *= -2
            d += lengths
            d[d <= ROUNDING * lengths] = 0.0
            yield rows, columns, d.astype(np.float32)
