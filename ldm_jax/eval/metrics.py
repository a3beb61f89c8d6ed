"""Every metric of image sets by name: the features it takes, and what of a reference."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval import frechet, inception_score, kernel, neighbours
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.protocol import Preset
from ldm_jax.eval.references import Gaussian

SECOND = "neighbours-"  # before the taps of a preset's second network
Figures = dict[str, float]


class Measured(NamedTuple):
    """Images by their features."""

    moments: Mapping[str, Moments]  # tap -> sums over all images
    features: Callable[[str], np.ndarray]  # tap -> f32 [N,D]


class Target(NamedTuple):
    """What they are held against."""

    digest: str
    gaussian: Callable[[str, int], Gaussian]  # (tap, width)
    features: Callable[[str], np.ndarray]  # tap -> f32 [M,D]


class Metric(NamedTuple):
    tap: Callable[[Preset], str]  # "": the preset has no such features
    sums: bool  # it takes the features' sums alone, else the features themselves
    reference: str  # what of the reference: "" | "gaussian" | "features"
    least: Callable[[Preset], int]  # images that it takes of either set
    usual: Callable[[Preset], bool]  # measured where no metric is asked for by name
    figures: Callable[[Preset, str, Measured, Target], Figures]


def _frechet(name: str):
    def figures(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
        one = images.moments[tap]
        real = frechet.Gaussian.of(*target.gaussian(tap, one.total.size))
        return {name: frechet.Gaussian.fitted(one).distance(real)}

    return figures


def _fid_infinity(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    features = images.features(tap)
    real = frechet.Gaussian.of(*target.gaussian(tap, features.shape[1]))
    smallest = smallest_part(len(features))
    return {"fid_infinity": frechet.extrapolated(features, real, 0, smallest=smallest).value}


def smallest_part(num: int) -> int:
    """Of `num` images, those of the smallest set that fid_infinity is extrapolated from."""
    return min(5000, num // 10)


def _inception_score(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    score = inception_score.inception_score
    if not preset.inception_shuffled:
        score = inception_score.inception_score_adm
    mean, std = score(images.features(tap))
    return {"is": mean, "is_std": std}


def _kid(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    real, fake = target.features(tap), images.features(tap)
    mean, std = kernel.kid(
        fake,
        real,
        subsets=preset.kid_subsets,
        subset_size=preset.kid_subset_size,
        seed=preset.kid_seed,
    )
    return {"kid": mean, "kid_std": std}


def _cmmd(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    return {"cmmd": kernel.cmmd(images.features(tap), target.features(tap))}


def _precision_recall(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    real, fake = _manifold(preset, target.features(tap), len(images.features(tap))), images
    both = neighbours.precision_recall(real, fake.features(tap), k=preset.neighbours_k)
    return dict(zip(("precision", "recall"), both, strict=True))


def _density_coverage(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    real = _manifold(preset, target.features(tap), len(images.features(tap)))
    both = neighbours.density_coverage(real, images.features(tap))
    return dict(zip(("density", "coverage"), both, strict=True))


def _memorisation(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    found = neighbours.memorisation(images.features(tap), target.features(tap))
    median = float(np.median(found.ratio))
    return {"copied": found.copied, "repeated": found.repeated, "nearest_ratio_median": median}


def _manifold(preset: Preset, real: np.ndarray, num: int) -> np.ndarray:
    """The real images that span the manifold, spread over those there are."""
    count = min(len(real), preset.neighbours_real or num)
    return real[np.linspace(0, len(real) - 1, count).round().astype(np.int64)]


def neighbours_tap(preset: Preset) -> str:
    tap = preset.neighbours_tap or preset.tap
    return SECOND + tap if preset.neighbours_extractor else tap


def _clip(preset: Preset) -> bool:
    return preset.extractor.startswith("clip")


def _two(preset: Preset) -> int:
    return 2


def _always(preset: Preset) -> bool:
    return True


def _never(preset: Preset) -> bool:
    return False


def _not_clip(preset: Preset) -> bool:
    return not _clip(preset)


def _pool(preset: Preset) -> str:
    return preset.tap


METRICS = {
    "fid": Metric(_pool, True, "gaussian", _two, _not_clip, _frechet("fid")),
    "sfid": Metric(lambda p: p.spatial_tap, True, "gaussian", _two, _always, _frechet("sfid")),
    "inception_score": Metric(
        lambda p: p.logits_tap, False, "", lambda p: 10, _always, _inception_score
    ),
    "kid": Metric(_pool, False, "features", lambda p: p.kid_subset_size, _not_clip, _kid),
    "cmmd": Metric(_pool, False, "features", _two, _clip, _cmmd),
    "precision_recall": Metric(
        neighbours_tap,
        False,
        "features",
        lambda p: p.neighbours_k + 1,
        _not_clip,
        _precision_recall,
    ),
    "density_coverage": Metric(
        neighbours_tap, False, "features", lambda p: 6, _not_clip, _density_coverage
    ),
    "memorisation": Metric(neighbours_tap, False, "features", _two, _never, _memorisation),
    "fid_infinity": Metric(_pool, False, "gaussian", lambda p: 150, _never, _fid_infinity),
}


def choose(
    asked: Iterable[str],
    preset: Preset,
    offers: Callable[[str, str], bool],
    counts: Mapping[str, int],
) -> tuple[str, ...]:
    """The metrics to measure: those asked for, or the usual ones that the sets allow.

    `offers` says whether the reference has the "gaussian" or the "features" of a tap; `counts` are
    the images of each set. Raises InputError for a metric that is asked for and cannot be had, and
    where there is none.
    """
    what, fewest = min(counts.items(), key=lambda item: item[1])

    def lack(name: str) -> str:
        metric = METRICS[name]
        tap, least = metric.tap(preset), metric.least(preset)
        if not tap:
            return "this preset has no features for it; leave it out"
        if metric.reference and not offers(metric.reference, tap):
            need = {"gaussian": f"statistics of {tap!r} or images"}
            need |= {"features": "images, not statistics alone"}
            return (
                f"it takes a reference of {need[metric.reference]}; give one with --reference, or "
                "leave the metric out"
            )
        if fewest < least:
            return (
                f"it takes {least} images or more, and {what} is of {fewest}; take more images or "
                "leave the metric out"
            )
        return ""

    asked = tuple(asked)
    for name in asked:
        if lack(name):
            raise InputError(f"metric {name!r}: {lack(name)}")
    usual = [name for name, metric in METRICS.items() if metric.usual(preset)]
    chosen = asked or tuple(name for name in usual if not lack(name))
    if not chosen:
        raise InputError(f"no metric can be had; {usual[0]!r}: {lack(usual[0])}")
    return chosen


def taps(names: Iterable[str], preset: Preset, *, sums: bool) -> dict[str, None]:
    """The taps whose sums, or whose features, the metrics take."""
    return {METRICS[n].tap(preset): None for n in names if METRICS[n].sums == sums}
