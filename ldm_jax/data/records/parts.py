"""Statistics of what a latent cache's moments hold: the means, and each measure of their spread.

Of the stored moments that are not mirrored, in one pass; kept beside the manifest, which knows the
statistics of draws alone.
"""

import contextlib
import dataclasses
import json

import numpy as np

from ldm_jax.data.records.reader import LatentCache
from ldm_jax.files import write_json

PARTS = "parts.json"
LOGVAR = (-30.0, 20.0)  # what log-variances are clamped to, as codecs clamp them
BINS = 1 << 16  # of the log-variance, for quantiles
QUANTILES = (0.001, 0.999)
ROWS = 256  # examples at a time: the sums' last bits depend on it


@dataclasses.dataclass(frozen=True)
class Part:
    """Statistics over examples and grid, [C] each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    global_std: float  # over all channels together, about the one global mean
    low: tuple[float, ...] = ()  # the quantiles 0.001 and 0.999 of a spread
    high: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("mean", "std", "low", "high"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


Parts = dict[str, Part]
"""By name: "mean", "logvar", and "std" and "var", which the log-variance makes."""


def measure(cache: LatentCache) -> Parts:
    """The parts of a cache of Gaussians; f64 sums in the order of the examples."""
    assert cache.manifest.posterior == "gaussian", "a point has no parts"
    height, width, channels = cache.manifest.latent_shape
    sums: dict[str, np.ndarray] = {}
    counts = np.zeros((channels, BINS), np.int64)
    for start in range(0, len(cache), ROWS):
        rows = np.arange(start, min(start + ROWS, len(cache)))
        moments = cache.read(rows, rows)["moments"].astype(np.float64)
        mean, logvar = np.split(moments.reshape(-1, 2 * channels), 2, axis=-1)
        logvar = np.clip(logvar, *LOGVAR)
        parts = {"mean": mean, "logvar": logvar, "std": np.exp(logvar / 2), "var": np.exp(logvar)}
        for name, x in parts.items():
            sums[name] = sums.get(name, 0) + np.stack([x.sum(0), (x**2).sum(0)])
        counts += _histogram(logvar)
    count = len(cache) * height * width
    low, high = _quantiles(counts)
    edges = {
        "mean": (np.zeros(0), np.zeros(0)),
        "logvar": (low, high),
        "std": (np.exp(low / 2), np.exp(high / 2)),
        "var": (np.exp(low), np.exp(high)),
    }
    return {name: _part(total / count, *edges[name]) for name, total in sums.items()}


def save(cache: LatentCache, parts: Parts) -> None:
    """Keeps them beside the manifest, where that folder can be written."""
    plain = {name: dataclasses.asdict(part) for name, part in parts.items()}
    with contextlib.suppress(OSError):  # a cache may lie on a disk that is read-only
        write_json(
            cache.directory / PARTS, {"manifest_hash": cache.manifest.hash(), "parts": plain}
        )


def load(cache: LatentCache) -> Parts | None:
    """Those that were kept; None where there are none, or none of this cache."""
    try:
        kept = json.loads((cache.directory / PARTS).read_text(encoding="utf-8"))
        if kept["manifest_hash"] != cache.manifest.hash():
            return None
        return {name: Part(**part) for name, part in kept["parts"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # what cannot be read is measured again


def _part(moments: np.ndarray, low: np.ndarray, high: np.ndarray) -> Part:
    """From E[x] and E[x^2], [2, C], and quantiles [C]."""
    mean, second = moments
    # The variance of what is constant may round to below 0.
    std = np.sqrt(np.maximum(second - mean**2, 0))
    whole = np.sqrt(max(second.mean() - mean.mean() ** 2, 0))
    lists = [tuple(x.tolist()) for x in (mean, std, low, high)]
    return Part(lists[0], lists[1], float(whole), lists[2], lists[3])


def _histogram(logvar: np.ndarray) -> np.ndarray:
    """Counts int64 [C, BINS] of clamped log-variances [N, C]."""
    channels = logvar.shape[-1]
    bins = ((logvar - LOGVAR[0]) * (BINS / (LOGVAR[1] - LOGVAR[0]))).astype(np.int64)
    flat = np.minimum(bins, BINS - 1) + BINS * np.arange(channels)
    return np.bincount(flat.ravel(), minlength=channels * BINS).reshape(channels, BINS)


def _quantiles(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) [C] of counts [C, BINS]: the outer edges of the bins that they lie in."""
    share = counts.cumsum(1) / counts.sum(1, keepdims=True)
    low, high = ((share >= q).argmax(1) for q in QUANTILES)
    width = (LOGVAR[1] - LOGVAR[0]) / BINS
    return LOGVAR[0] + low * width, LOGVAR[0] + (high + 1) * width
