"""Every metric of image sets by name: the features it takes, and what of a reference."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ldm_jax.errors import InputError
from ldm_jax.eval import frechet, inception_score, kernel, neighbours
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.protocol import Preset
from ldm_jax.eval.references import MeanCovariance

SECOND = "neighbours-"  # before the taps of a preset's second network
Figures = dict[str, float]


class Measured(NamedTuple):
    """Images by their features."""

    moments: Mapping[str, Moments]  # tap -> sums over all images
    features: Callable[[str], np.ndarray]  # tap -> f32 [N,D]


class Target(NamedTuple):
    """What they are held against."""

    digest: str
    gaussian: Callable[[str, int], MeanCovariance]  # (tap, width)
    features: Callable[[str], np.ndarray]  # tap -> f32 [M,D]


class Metric(NamedTuple):
    figures: Callable[[Preset, str, Measured, Target], Figures]  # of a preset and its tap
    tap: Callable[[Preset], str]  # "": the preset has no such features
    sums: bool = False  # it takes the features' sums alone, else the features themselves
    reference: str = ""  # what of the reference: "" | "gaussian" | "features"
    least: Callable[[Preset], int] = lambda preset: 2  # images that it takes of either set
    # Measured where no metric is asked for by name.
    usual: Callable[[Preset], bool] = lambda preset: True
    names: tuple[str, ...] = ()  # of its figures; () = one of the metric's own name


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
    fake = images.features(tap)
    real = _manifold(preset, target.features(tap), len(fake))
    both = neighbours.precision_recall(real, fake, k=preset.neighbours_k)
    return dict(zip(("precision", "recall"), both, strict=True))


def _density_coverage(preset: Preset, tap: str, images: Measured, target: Target) -> Figures:
    fake = images.features(tap)
    real = _manifold(preset, target.features(tap), len(fake))
    both = neighbours.density_coverage(real, fake)
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


def _pool(preset: Preset) -> str:
    return preset.tap


def _clip(preset: Preset) -> bool:
    return preset.extractor.startswith("clip")


def _not_clip(preset: Preset) -> bool:
    return not _clip(preset)


def _never(preset: Preset) -> bool:
    return False


METRICS = {
    "fid": Metric(_frechet("fid"), _pool, sums=True, reference="gaussian", usual=_not_clip),
    "sfid": Metric(_frechet("sfid"), lambda p: p.spatial_tap, sums=True, reference="gaussian"),
    "inception_score": Metric(
        _inception_score, lambda p: p.logits_tap, least=lambda p: 10, names=("is", "is_std")
    ),
    "kid": Metric(
        _kid,
        _pool,
        reference="features",
        least=lambda p: p.kid_subset_size,
        usual=_not_clip,
        names=("kid", "kid_std"),
    ),
    "cmmd": Metric(_cmmd, _pool, reference="features", usual=_clip),
    "precision_recall": Metric(
        _precision_recall,
        neighbours_tap,
        reference="features",
        least=lambda p: p.neighbours_k + 1,
        usual=_not_clip,
        names=("precision", "recall"),
    ),
    "density_coverage": Metric(
        _density_coverage,
        neighbours_tap,
        reference="features",
        least=lambda p: 6,
        usual=_not_clip,
        names=("density", "coverage"),
    ),
    "memorisation": Metric(
        _memorisation,
        neighbours_tap,
        reference="features",
        usual=_never,
        names=("copied", "repeated", "nearest_ratio_median"),
    ),
    "fid_infinity": Metric(
        _fid_infinity, _pool, reference="gaussian", least=lambda p: 150, usual=_never
    ),
}


def choose_metrics(
    names: Iterable[str],
    preset: Preset,
    offers: Callable[[str, str], bool],
    counts: Mapping[str, int],
) -> tuple[str, ...]:
    """The metrics to measure: `names`, or without any the usual ones that the sets allow.

    `offers` says whether the reference has the "gaussian" or the "features" of a tap; `counts` are
    the images of each set. Raises InputError for a metric of `names` that cannot be had, and where
    there is none.
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

    names = tuple(names)
    for name in names:
        if lack(name):
            raise InputError(f"metric {name!r}: {lack(name)}")
    usual = [name for name, metric in METRICS.items() if metric.usual(preset)]
    chosen = names or tuple(name for name in usual if not lack(name))
    if not chosen:
        raise InputError(f"no metric can be had; {usual[0]!r}: {lack(usual[0])}")
    return chosen


def taps(names: Iterable[str], preset: Preset, *, sums: bool) -> dict[str, None]:
    """The taps whose sums, or whose features, the metrics take."""
    return {METRICS[n].tap(preset): None for n in names if METRICS[n].sums == sums}
