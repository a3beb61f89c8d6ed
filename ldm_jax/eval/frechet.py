"""Fréchet distance between Gaussians fitted to two sets of features, from streaming f64 moments."""

import dataclasses

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval.feature_sets import BLOCK, blocks, checked


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sufficient statistics of features [N,D] in f64; they add up over batches and over hosts."""

    count: int
    total: np.ndarray  # [D], sum of the features
    outer: np.ndarray  # [D,D], sum of their outer products

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """The moments of one array of features [N,D]."""
        return cls.empty(np.shape(features)[-1]).add(features)

    def add(self, features: np.ndarray) -> "Moments":
        """With the rows of `features` [N,D] added; raises InputError where one is not finite."""
        f = np.asarray(features, np.float64)
        if f.ndim != 2 or f.shape[1] != self.total.size:
            raise InputError(f"features of shape {f.shape}: the rule is [N, {self.total.size}]")
        bad = np.count_nonzero(~np.isfinite(f).all(1))
        if bad:
            raise InputError(
                f"features of {bad} of {len(f)} images are not finite; look at the images "
                "and at the network that made them"
            )
        return Moments(self.count + len(f), self.total + f.sum(0), self.outer + f.T @ f)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        if other.total.size != self.total.size:
            raise InputError(f"features of {self.total.size} and {other.total.size} values differ")
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> np.ndarray:
        """[D]; raises InputError for an empty set."""
        self._require(1)
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[D,D], normalised by N - 1; raises InputError below two images."""
        self._require(2)
        mean = self.mean
        return (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)

    def _require(self, least: int) -> None:
        if self.count < least:
            raise InputError(f"{self.count} image(s): at least {least} are needed; take more")


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A normal distribution ready to be compared; made once for a reference, it halves the work."""

    mean: np.ndarray  # [D]
    root: np.ndarray  # R [D,r] with R R^T = C, r = rank of C
    trace: float  # of C

    @classmethod
    def fitted(cls, moments: Moments) -> "Gaussian":
        """To a set of two images or more."""
        return cls.of(moments.mean, moments.covariance)

    @classmethod
    def of(cls, mean: np.ndarray, covariance: np.ndarray) -> "Gaussian":
        """With this mean [D] and covariance [D,D]; raises InputError where they are not that."""
        mean, c = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or c.shape != 2 * mean.shape or not np.isfinite(c.sum() + mean.sum()):
            raise InputError(
                f"mean {mean.shape} and covariance {c.shape}: the rule is finite [D] and [D,D]; "
                "make the statistics again"
            )
        return cls(mean, _root(c), float(np.trace(c)))

    def distance(self, other: "Gaussian") -> float:
        """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2).

        The last trace is the sum of the singular values of R1^T R2, exact for singular covariances
        too, where the square root of the product's eigenvalues loses half the digits.
        """
        if self.mean.size != other.mean.size:
            raise InputError(f"features of {self.mean.size} and {other.mean.size} values differ")
        product = self.root.T @ other.root
        cross = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
        difference = self.mean - other.mean
        return max(0.0, float(difference @ difference + self.trace + other.trace - 2 * cross))


def frechet_distance(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2) of means [D] and covariances [D,D].

    Dowson and Landau, J. Multivariate Analysis 12 (1982); Heusel et al., NeurIPS 2017. On the
    features of ADM's spatial layer the same formula is sFID.
    """
    return Gaussian.of(m1, c1).distance(Gaussian.of(m2, c2))


def distance(first: Moments, second: Moments) -> float:
    """Fréchet distance between two sets.

    Biased upwards by roughly 1/N, so compare figures of equal N only. Raises InputError when a set
    has fewer than two images or when the widths differ.
    """
    return Gaussian.fitted(first).distance(Gaussian.fitted(second))


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """A line in 1/N through the distances of subsets; `value` is its end at N = infinity."""

    value: float  # may fall below 0 by chance
    slope: float  # distance(N) = value + slope / N
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def extrapolated(
    features: np.ndarray,
    reference: Gaussian,
    seed: int,
    *,
    smallest: int = 5000,
    points: int = 15,
) -> Extrapolation:
    """The distance of features [N,D] to `reference`, without the bias that falls with 1/N.

    `points` sizes from `smallest` to N at equal steps, a random subset of each, least squares. The
    bias is linear in 1/N where `smallest` is well above D; the reference keeps its own. Chong and
    Forsyth, CVPR 2020, section 3. Raises InputError for too few images.
    """
    x = checked(features)
    if points < 2 or smallest < 2 or len(x) < smallest + points - 1:
        raise InputError(
            f"{points} sizes from {smallest} to {len(x)} images: the rule is 2 or more different "
            "sizes of 2 or more images; take more images or a smaller `smallest`"
        )
    rng = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(x), points).astype(int)
    distances = []
    for size in sizes:
        rows = rng.permutation(len(x))[:size]
        moments = Moments.empty(x.shape[1])
        for part in blocks(size, 4 * BLOCK):
            moments = moments.add(x[rows[part]])
        distances.append(Gaussian.fitted(moments).distance(reference))
    slope, value = np.polyfit(1 / sizes, distances, 1)
    return Extrapolation(float(value), float(slope), tuple(sizes.tolist()), tuple(distances))


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [D,r] with R R^T = C, for symmetric C >= 0 of rank r up to rounding."""
    values, vectors = np.linalg.eigh(covariance)
    # An eigenvalue below the rounding of the largest is noise around 0, but its root is not small.
    large = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, large] * np.sqrt(values[large])
