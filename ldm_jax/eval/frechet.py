"""Fréchet distance between Gaussians fitted to two sets of features, from streaming f64 moments."""

import dataclasses

import numpy as np

from ldm_jax.errors import InputError


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


def frechet_distance(m1: np.ndarray, c1: np.ndarray, m2: np.ndarray, c2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2) of means [D] and covariances [D,D].

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2), exact for singular
    covariances too, where the square root of the product's eigenvalues loses half the digits.
    Dowson and Landau, J. Multivariate Analysis 12 (1982); Heusel et al., NeurIPS 2017.
    """
    r1, r2 = _root(c1), _root(c2)
    cross = np.linalg.svd(r1.T @ r2, compute_uv=False).sum()
    difference = np.asarray(m1, np.float64) - np.asarray(m2, np.float64)
    return max(0.0, float(difference @ difference + np.trace(c1) + np.trace(c2) - 2 * cross))


def distance(first: Moments, second: Moments) -> float:
    """Fréchet distance between two sets.

    Biased upwards by roughly 1/N, so compare figures of equal N only. Raises InputError when a set
    has fewer than two images or when the widths differ.
    """
    if first.total.size != second.total.size:
        raise InputError(f"features of {first.total.size} and {second.total.size} values differ")
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def _root(covariance: np.ndarray) -> np.ndarray:
    """R [D,D] with R R^T = C, for symmetric C >= 0 up to rounding."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    # An eigenvalue below the rounding of the largest is noise around 0, but its root is not small.
    floor = values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors * np.sqrt(np.where(values > floor, values, 0.0))
