"""Figures of a set of images against a reference, by a frozen network: FID and its kin.

One pass over the images gives the sums and the features that every figure is made of; it is resumed
where it was killed. What a reference lacks in statistics is measured of its images, once. The
protocol is part of each figure's name.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax import files
from ldm_jax.errors import InputError
from ldm_jax.eval import references
from ldm_jax.eval.accumulate import Accumulator, accumulate, read_features, read_manifest
from ldm_jax.eval.image_sets import ImageStream, open_set
from ldm_jax.eval.judge import Judge, JudgeOptions, find_preset, open_judge
from ldm_jax.eval.metrics import METRICS, Measured, Target, choose_metrics, smallest_part, taps
from ldm_jax.eval.protocol import Protocol, append
from ldm_jax.sharding import wait_for_all


class Reference(NamedTuple):
    """What images are held against, before anything of it is measured; neither = there is none."""

    statistics: references.Statistics | None
    images: ImageStream | None

    def offers(self, part: str, tap: str) -> bool:
        """Whether it has the "gaussian" or the "features" of a tap; statistics go before images."""
        if part == "gaussian" and self.statistics:
            return tap in self.statistics.gaussians
        return self.images is not None

    @property
    def num(self) -> int:
        """Images behind its Gaussians; 0 = unknown."""
        if self.statistics:
            return self.statistics.num
        return self.images.num if self.images else 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Compiled networks and a reference, for any number of sets of images."""

    judge: Judge
    metrics: tuple[str, ...]
    target: Callable[[], Target]  # measured at its first call, which every process must make
    folder: Path  # takes features, and what a killed evaluation goes on from

    def figure_names(self, num: int) -> tuple[str, ...]:
        """Names, up to their hash, of the figures of `num` images; nothing is measured for them."""
        protocol = self.judge.protocol(num, "none", {})
        figures = [figure for name in self.metrics for figure in METRICS[name].names or (name,)]
        return tuple(protocol.name_to_hash(figure) for figure in figures)


def prepare(
    options: JudgeOptions,
    *,
    mesh: Mesh,
    folder: Path,
    num: int,
    reference: ImageStream | None = None,
) -> Evaluation:
    """Loads and compiles what judges sets of `num` images; every process must call it.

    The images of `reference` serve where the options name none. Raises InputError before any image
    is measured: for weights, references and numbers that do not do.
    """
    preset = find_preset(options)
    against = _find_reference(options, reference)
    counts = {"what is judged": num}
    if against.images:
        counts["the reference"] = against.images.num
    metrics = choose_metrics(options.metrics, preset, against.offers, counts)
    sums, kept = (taps(metrics, preset, sums=s) for s in (True, False))
    judge = open_judge(options, mesh, {**sums, **kept})
    if not options.allow_few:
        _check_enough(judge, metrics, num, against.num)
    if against.statistics:
        references.refuse_other_features(against.statistics, judge.protocol(num, "none", {}))
        for name in metrics:
            if METRICS[name].reference == "gaussian":
                tap = METRICS[name].tap(preset)
                against.statistics.gaussian(tap, judge.taps[tap])
    target = functools.cache(lambda: _measure_reference(against, judge, metrics, folder))
    return Evaluation(judge, metrics, target, folder)


def check_keep(evaluation: Evaluation, images: ImageStream) -> None:
    """InputError where the folder that images are kept in holds others' than a killed run's."""
    begun = any(evaluation.folder.glob(f"*-{_source_name(images)}"))
    if images.keep and images.keep.exists() and any(images.keep.iterdir()) and not begun:
        raise InputError(f"keep {images.keep} must be a new or an empty folder; give another")


def evaluate(
    evaluation: Evaluation,
    images: ImageStream,
    results: Path,
    *,
    labels: str = "none",
    sampling: Mapping[str, Any] = MappingProxyType({}),
    prefix: str = "",
    record: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, float]:
    """The figures of `images` by name, appended with their protocol to the lines of `results`.

    `prefix` comes before the metrics' names, as the r of rFID; `record` joins the line. Every
    process must call it and gets the figures.
    """
    judge, preset, target = evaluation.judge, evaluation.judge.preset, evaluation.target()
    protocol = judge.protocol(images.num, labels, {**sampling, "reference": target.digest})
    folder = evaluation.folder / f"{protocol.hash()[:16]}-{_source_name(images)}"
    sums, kept = (taps(evaluation.metrics, preset, sums=s) for s in (True, False))
    measured, _ = _measure(judge, images, protocol, folder, sums, kept)
    figures: dict[str, float] = {}
    for name in evaluation.metrics:
        metric = METRICS[name]
        figures |= metric.figures(preset, metric.tap(preset), measured, target)
    named = {protocol.metric_name(prefix + name): value for name, value in figures.items()}
    if jax.process_index() == 0:
        when = files.utc_now()
        append(results, protocol, named, time=when, images=images.digest, **record)
    _remove(folder)
    return named


def write_statistics(options: JudgeOptions, images: ImageStream, *, mesh: Mesh, out: Path) -> None:
    """Writes statistics of images as `out`, for all the Fréchet distances that a preset has."""
    preset = find_preset(options)
    sums = taps([n for n in ("fid", "sfid") if METRICS[n].tap(preset)], preset, sums=True)
    judge = open_judge(options, mesh, sums)
    if not options.allow_few:
        for tap in sums:
            references.check_enough(images.num, judge.taps[tap], images.name)
    protocol = judge.protocol(images.num, "none", {"images": images.digest})
    folder = out.with_name(f".{out.name}.partial")
    measured, _ = _measure(judge, images, protocol, folder, sums, ())
    if jax.process_index() == 0:
        references.save(out, measured.moments, _made_by(protocol, images))
    _remove(folder)


def _find_reference(options: JudgeOptions, images: ImageStream | None) -> Reference:
    if options.reference:
        return _open_reference(options.reference, options.allow_few)
    alone = options.metrics and not any(METRICS[name].reference for name in options.metrics)
    if images is None and not alone:
        raise InputError("there is nothing to compare with; name it with --reference")
    return Reference(None, images)


def _open_reference(path: str, allow_few: bool) -> Reference:
    """Statistics, images, or both in one file; InputError for what is neither."""
    if Path(path).is_dir() or "://" in path:
        return Reference(None, open_set(path))
    if Path(path).suffix == ".pkl":
        return Reference(references.load(path, allow_few=allow_few), None)
    names = files.headers(path)
    images = open_set(path) if "arr_0" in names else None
    if {"mu", "ref_mu", "header", "mu_s", "mu_cls"} & names.keys():
        return Reference(references.load(path, allow_few=allow_few), images)
    return Reference(None, images or open_set(path))


def _check_enough(judge: Judge, metrics: Iterable[str], num: int, reference_num: int) -> None:
    """InputError where covariances of `num` images, or of the reference's, would be singular."""
    for tap in taps(metrics, judge.preset, sums=True):
        references.check_enough(num, judge.taps[tap], "what is judged")
        if reference_num:
            references.check_enough(reference_num, judge.taps[tap], "the reference")
    if "fid_infinity" in metrics:
        tap = METRICS["fid_infinity"].tap(judge.preset)
        least = "the smallest part that fid_infinity takes of what is judged"
        references.check_enough(smallest_part(num), judge.taps[tap], least)


def _measure(
    judge: Judge,
    images: ImageStream,
    protocol: Protocol,
    folder: Path,
    sums: Iterable[str],
    kept: Iterable[str],
) -> tuple[Measured, Accumulator]:
    """The features of all images; a killed measuring goes on in `folder`, until it is discarded."""
    rows = images.rows or judge.rows
    read = images.open(rows)
    moments, state = accumulate(
        folder,
        protocol,
        lambda indices: judge.measure_many(read(indices), rows),
        rows,
        moments={tap: judge.taps[tap] for tap in sums},
        kept={tap: judge.taps[tap] for tap in kept},
    )
    return Measured(moments, functools.partial(read_features, folder)), state


def _measure_reference(
    reference: Reference, judge: Judge, metrics: Iterable[str], folder: Path
) -> Target:
    """The reference's sums and features, from its file where they are and else measured, once."""
    preset, statistics, images = judge.preset, reference.statistics, reference.images
    needs = {METRICS[name].reference for name in metrics}
    sums = {} if statistics or "gaussian" not in needs else taps(metrics, preset, sums=True)
    if "fid_infinity" in metrics and not statistics:
        sums |= {METRICS["fid_infinity"].tap(preset): None}
    wanted = [n for n in metrics if METRICS[n].reference == "features"]
    kept = taps(wanted, preset, sums=False)
    measured = None
    if images and (sums or kept):
        protocol = judge.protocol(images.num, "none", {"images": images.digest})
        at = folder / f"reference-{protocol.hash()[:16]}"
        measured = _read_or_measure(judge, images, protocol, at, sums, kept)

    def gaussian(tap: str, width: int) -> references.MeanCovariance:
        if statistics:
            return statistics.gaussian(tap, width)
        assert measured is not None
        moments = measured.moments[tap]
        return references.MeanCovariance(moments.mean, moments.covariance)

    def features(tap: str) -> np.ndarray:
        assert measured is not None
        return measured.features(tap)

    digests = [statistics.sha256] if statistics else []
    digests += [images.digest] if images and (measured or not statistics) else []
    return Target("+".join(dict.fromkeys(digests)), gaussian, features)


def _read_or_measure(
    judge: Judge,
    images: ImageStream,
    protocol: Protocol,
    folder: Path,
    sums: Mapping[str, None],
    kept: Mapping[str, None],
) -> Measured:
    """What an earlier evaluation has measured of the same images by the same judge, or that now."""
    path = folder / "statistics.npz"
    moments = references.load(path, allow_few=True).moments if path.exists() else {}
    widths = read_manifest(folder).get("widths", {})
    if sums.keys() <= moments.keys() and kept.keys() <= widths.keys():
        return Measured(moments, functools.partial(read_features, folder))
    measured, state = _measure(judge, images, protocol, folder, sums, kept)
    if jax.process_index() == 0 and sums:
        references.save(path, measured.moments, _made_by(protocol, images))
    state.discard()
    return measured


def _made_by(protocol: Protocol, images: ImageStream) -> references.Made:
    return references.Made(
        extractor=protocol.extractor,
        extractor_digest=protocol.extractor_digest,
        resize=protocol.resize,
        quantiser=protocol.quantiser,
        dataset=images.digest,
    )


def _source_name(images: ImageStream) -> str:
    """Of whose images a folder of features is; what was not kept is no part of what is to be."""
    kept = str(images.keep.absolute()) if images.keep else ""
    return files.digest(f"{images.digest}\0{kept}")[:8]


def _remove(folder: Path) -> None:
    """Takes a folder of features away, when no process needs them any more."""
    wait_for_all(f"remove {folder}")
    if jax.process_index() == 0:
        shutil.rmtree(folder)
