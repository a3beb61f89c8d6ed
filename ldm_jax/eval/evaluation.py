"""Figures of a set of images against a reference, by a frozen network: FID and its kin.

One pass over the images gives the sums and the features that every figure is made of; it is resumed
where it was killed. The protocol is part of each figure's name.
"""

import dataclasses
import datetime
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from ldm_jax.errors import InputError
from ldm_jax.eval import references
from ldm_jax.eval.judge import ImageStream, Judge, JudgeOptions, find_preset, open_judge
from ldm_jax.eval.measure import (
    Reference,
    made_of,
    measure,
    measure_reference,
    open_reference,
    remove,
)
from ldm_jax.eval.metrics import METRICS, Target, choose, smallest_part, taps
from ldm_jax.eval.protocol import append


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Compiled networks and a reference, for any number of sets of images."""

    judge: Judge
    metrics: tuple[str, ...]
    target: Callable[[], Target]  # measured at its first call, which every process must make
    folder: Path  # takes features, and what a killed evaluation goes on from


def prepare(
    settings: JudgeOptions, *, mesh: Mesh, folder: Path, num: int, own: ImageStream | None = None
) -> Evaluation:
    """Loads and compiles what judges sets of `num` images; every process must call it.

    `own` is the reference where the settings name none. Raises InputError before any image is
    measured: for weights, references and numbers that do not do.
    """
    preset = find_preset(settings)
    reference = _find_reference(settings, own)
    counts = {"what is judged": num}
    if reference.images:
        counts["the reference"] = reference.images.num
    metrics = choose(settings.metrics, preset, reference.offers, counts)
    sums, kept = (taps(metrics, preset, sums=s) for s in (True, False))
    judge = open_judge(settings, mesh, {**sums, **kept})
    if not settings.allow_few:
        for tap in sums:
            references.check_enough(num, judge.taps[tap], "what is judged")
            if reference.num:
                references.check_enough(reference.num, judge.taps[tap], "the reference")
        if "fid_infinity" in metrics:
            tap = METRICS["fid_infinity"].tap(preset)
            least = "the smallest part that fid_infinity takes of what is judged"
            references.check_enough(smallest_part(num), judge.taps[tap], least)
    if reference.stats:
        references.refuse_other_features(reference.stats, judge.protocol(num, "none", {}))
        for name in metrics:
            if METRICS[name].reference == "gaussian":
                tap = METRICS[name].tap(preset)
                reference.stats.gaussian(tap, judge.taps[tap])
    target = functools.cache(lambda: measure_reference(reference, judge, metrics, folder))
    return Evaluation(judge, metrics, target, folder)


def _find_reference(settings: JudgeOptions, own: ImageStream | None) -> Reference:
    if settings.reference:
        return open_reference(settings.reference, settings.allow_few)
    alone = settings.metrics and not any(METRICS[name].reference for name in settings.metrics)
    if own is None and not alone:
        raise InputError("there is nothing to compare with; name it with --reference")
    return Reference(None, own)


def check_keep(evaluation: Evaluation, images: ImageStream) -> None:
    """InputError where the folder that images are kept in holds others' than a killed run's."""
    begun = any(evaluation.folder.glob(f"*-{_made_by(images)}"))
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
    how = {**sampling, "reference": target.digest}
    protocol = judge.protocol(images.num, labels, how)
    folder = evaluation.folder / f"{protocol.hash()[:16]}-{_made_by(images)}"
    sums, kept = (taps(evaluation.metrics, preset, sums=s) for s in (True, False))
    measured, _ = measure(judge, images, protocol, folder, sums, kept)
    figures: dict[str, float] = {}
    for name in evaluation.metrics:
        metric = METRICS[name]
        figures |= metric.figures(preset, metric.tap(preset), measured, target)
    named = {protocol.metric_name(prefix + name): value for name, value in figures.items()}
    if jax.process_index() == 0:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        append(results, protocol, named, time=now, images=images.digest, **record)
    remove(folder)
    return named


def _made_by(images: ImageStream) -> str:
    """Of whose images a folder of features is; what was not kept is no part of what is to be."""
    kept = str(images.keep.absolute()) if images.keep else ""
    return hashlib.sha256(f"{images.digest}\0{kept}".encode()).hexdigest()[:8]


def write_statistics(settings: JudgeOptions, images: ImageStream, *, mesh: Mesh, out: Path) -> None:
    """Writes statistics of images as `out`, for all the Fréchet distances that a preset has."""
    preset = find_preset(settings)
    sums = taps([n for n in ("fid", "sfid") if METRICS[n].tap(preset)], preset, sums=True)
    judge = open_judge(settings, mesh, sums)
    if not settings.allow_few:
        for tap in sums:
            references.check_enough(images.num, judge.taps[tap], images.name)
    protocol = judge.protocol(images.num, "none", {"images": images.digest})
    folder = out.with_name(f".{out.name}.partial")
    measured, _ = measure(judge, images, protocol, folder, sums, ())
    if jax.process_index() == 0:
        references.save(out, measured.moments, made_of(protocol, images))
    remove(folder)
