"""Figures of a set of images against a reference, by a frozen network: FID and its kin.

One pass over the images gives the sums and the features that every figure is made of; it is resumed
where it was killed. The protocol is part of each figure's name.
"""

import dataclasses
import datetime
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ldm_jax import npz
from ldm_jax.errors import InputError
from ldm_jax.eval import image_sets, references
from ldm_jax.eval.accumulate import accumulate
from ldm_jax.eval.feature_store import read_features, read_manifest
from ldm_jax.eval.protocol import Protocol, append
from ldm_jax.jobs.image_judge import Images, Judge, Settings, find_preset, open_judge
from ldm_jax.jobs.image_metrics import METRICS, Measured, Target, choose, taps


class _Reference(NamedTuple):
    """What a reference holds, before anything of it is measured."""

    stats: references.Reference | None
    images: Images | None

    @property
    def offers(self) -> set[str]:
        return {"gaussian"} | ({"features"} if self.images else set())

    @property
    def num(self) -> int:
        return self.stats.num if self.stats else self.images.num if self.images else 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Compiled networks and a reference, for any number of sets of images."""

    judge: Judge
    metrics: tuple[str, ...]
    target: Callable[[], Target]  # measured at its first call, which every process must make
    folder: Path  # takes features, and what a killed evaluation goes on from


def prepare(
    settings: Settings, *, mesh: Mesh, folder: Path, num: int, own: Images | None = None
) -> Evaluation:
    """Loads and compiles what judges sets of `num` images; every process must call it.

    `own` is the reference where the settings name none. Raises InputError before any image is
    measured: for weights, references and numbers that do not do.
    """
    preset = find_preset(settings)
    reference = _open_reference(settings, own)
    counts = {"what is judged": num}
    if reference.images:
        counts["the reference"] = reference.images.num
    metrics = choose(settings.metrics, preset, reference.offers, counts)
    every = {**taps(metrics, preset, sums=True), **taps(metrics, preset, sums=False)}
    judge = open_judge(settings, mesh, every)
    if not settings.allow_few:
        for tap in taps(metrics, preset, sums=True):
            references.check_enough(num, judge.taps[tap], "what is judged")
            if reference.num:
                references.check_enough(reference.num, judge.taps[tap], "the reference")
    if reference.stats:
        protocol = judge.protocol(num, "none", {})
        references.refuse_other_features(reference.stats, protocol)
    target = functools.cache(lambda: _measure_reference(reference, judge, metrics, folder))
    return Evaluation(judge, metrics, target, folder)


def evaluate(
    evaluation: Evaluation,
    images: Images,
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
    made_by = hashlib.sha256(images.digest.encode()).hexdigest()[:8]
    folder = evaluation.folder / f"{protocol.hash()[:16]}-{made_by}"
    sums, kept = (taps(evaluation.metrics, preset, sums=s) for s in (True, False))
    measured = measure(judge, images, protocol, folder, sums, kept)
    figures: dict[str, float] = {}
    for name in evaluation.metrics:
        metric = METRICS[name]
        figures |= metric.figures(preset, metric.tap(preset), measured, target)
    named = {protocol.metric_name(prefix + name): value for name, value in figures.items()}
    if jax.process_index() == 0:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        append(results, protocol, named, time=now, images=images.digest, **record)
    _remove(folder)
    return named


def measure(
    judge: Judge,
    images: Images,
    protocol: Protocol,
    folder: Path,
    sums: Iterable[str],
    kept: Iterable[str],
) -> Measured:
    """The features of all images; a killed measuring goes on in `folder`."""
    rows = images.rows or judge.rows
    read = images.open(rows)
    moments, _ = accumulate(
        folder,
        protocol,
        lambda indices: judge.measure_many(read(indices), rows),
        rows,
        moments={tap: judge.taps[tap] for tap in sums},
        kept={tap: judge.taps[tap] for tap in kept},
    )
    return Measured(moments, functools.partial(read_features, folder))


def _remove(folder: Path) -> None:
    """Takes a folder of features away, when no process needs them any more."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"remove {folder}")
    if jax.process_index() == 0:
        shutil.rmtree(folder)


def write_statistics(settings: Settings, images: Images, *, mesh: Mesh, out: Path) -> None:
    """Writes statistics of images as `out`, for all the Fréchet distances that a preset has."""
    preset = find_preset(settings)
    sums = taps([n for n in ("fid", "sfid") if METRICS[n].tap(preset)], preset, sums=True)
    judge = open_judge(settings, mesh, sums)
    if not settings.allow_few:
        for tap in sums:
            references.check_enough(images.num, judge.taps[tap], images.name)
    protocol = judge.protocol(images.num, "none", {"images": images.digest})
    folder = out.with_name(f".{out.name}.partial")
    measured = measure(judge, images, protocol, folder, sums, ())
    if jax.process_index() == 0:
        references.save(out, measured.moments, _made(protocol, images))
    _remove(folder)


def open_set(path: str) -> Images:
    """A folder of images or an .npz in ADM's layout."""
    found = image_sets.open_images(path)
    return Images(found.num, found.reader, f"images {path}", found.digest)


def _open_reference(settings: Settings, own: Images | None) -> _Reference:
    path = settings.reference
    if not path:
        if own is None:
            raise InputError("there is nothing to compare with; name it with --reference")
        return _Reference(None, own)
    if Path(path).is_dir() or "://" in path:
        return _Reference(None, open_set(path))
    if Path(path).suffix == ".pkl":
        return _Reference(references.load(path, allow_few=settings.allow_few), None)
    names = npz.headers(path)
    holds = open_set(path) if "arr_0" in names else None
    if {"mu", "ref_mu", "header", "mu_s", "mu_cls"} & names.keys():
        return _Reference(references.load(path, allow_few=settings.allow_few), holds)
    return _Reference(None, holds or open_set(path))


def _measure_reference(
    reference: _Reference, judge: Judge, metrics: Iterable[str], folder: Path
) -> Target:
    """The reference's sums and features, from its file where they are and else measured, once."""
    preset, stats, images = judge.preset, reference.stats, reference.images
    needs = {METRICS[name].reference for name in metrics}
    sums = {} if stats or "gaussian" not in needs else taps(metrics, preset, sums=True)
    if "fid_infinity" in metrics and not stats:
        sums |= {METRICS["fid_infinity"].tap(preset): None}
    wanted = [n for n in metrics if METRICS[n].reference == "features"]
    kept = taps(wanted, preset, sums=False)
    measured = None
    if images and (sums or kept):
        protocol = judge.protocol(images.num, "none", {"images": images.digest})
        at = folder / f"reference-{protocol.hash()[:16]}"
        measured = _kept_or_measured(judge, images, protocol, at, sums, kept)

    def gaussian(tap: str, width: int) -> references.Gaussian:
        if stats:
            return stats.gaussian(tap, width)
        assert measured is not None
        moments = measured.moments[tap]
        return references.Gaussian(moments.mean, moments.covariance)

    def features(tap: str) -> np.ndarray:
        assert measured is not None
        return measured.features(tap)

    digests = [stats.sha256] if stats else []
    digests += [images.digest] if images and (measured or not stats) else []
    return Target("+".join(digests), gaussian, features)


def _kept_or_measured(
    judge: Judge,
    images: Images,
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
    measured = measure(judge, images, protocol, folder, sums, kept)
    if jax.process_index() == 0:
        if sums:
            references.save(path, measured.moments, _made(protocol, images))
        for partial in folder.glob("partial-*.npz"):
            partial.unlink()
    return measured


def _made(protocol: Protocol, images: Images) -> references.Made:
    return references.Made(
        extractor=protocol.extractor,
        extractor_digest=protocol.extractor_digest,
        resize=protocol.resize,
        quantiser=protocol.quantiser,
        dataset=images.digest,
    )
