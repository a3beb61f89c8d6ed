"""A set of images by its features, and what it is held against: measured once, or from a file."""

import functools
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ldm_jax import files as npz
from ldm_jax.data import images as image_data
from ldm_jax.eval import image_sets, references
from ldm_jax.eval.accumulate import Accumulator, accumulate
from ldm_jax.eval.feature_store import read_features, read_manifest
from ldm_jax.eval.judge import ImageStream, Judge
from ldm_jax.eval.metrics import METRICS, Measured, Target, taps
from ldm_jax.eval.protocol import Protocol


class Reference(NamedTuple):
    """What a reference holds, before anything of it is measured; neither = there is none."""

    stats: references.Reference | None
    images: ImageStream | None

    def offers(self, part: str, tap: str) -> bool:
        """Whether it has the "gaussian" or the "features" of a tap; statistics go before images."""
        if part == "gaussian" and self.stats:
            return tap in self.stats.gaussians
        return self.images is not None

    @property
    def num(self) -> int:
        """ImageStream behind its Gaussians; 0 = unknown."""
        return self.stats.num if self.stats else self.images.num if self.images else 0


def open_set(path: str) -> ImageStream:
    """A folder of images or an .npz in ADM's layout."""
    found = image_sets.open_images(path)
    return ImageStream(found.num, found.reader, f"images {path}", found.digest)


def open_reference(path: str, allow_few: bool) -> Reference:
    """Statistics, images, or both in one file; InputError for what is neither."""
    if Path(path).is_dir() or "://" in path:
        return Reference(None, open_set(path))
    if Path(path).suffix == ".pkl":
        return Reference(references.load(path, allow_few=allow_few), None)
    names = npz.headers(path)
    holds = open_set(path) if "arr_0" in names else None
    if {"mu", "ref_mu", "header", "mu_s", "mu_cls"} & names.keys():
        return Reference(references.load(path, allow_few=allow_few), holds)
    return Reference(None, holds or open_set(path))


def measure(
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


def remove(folder: Path) -> None:
    """Takes a folder of features away, when no process needs them any more."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"remove {folder}")
    if jax.process_index() == 0:
        shutil.rmtree(folder)


def measure_reference(
    reference: Reference, judge: Judge, metrics: Iterable[str], folder: Path
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
    return Target("+".join(dict.fromkeys(digests)), gaussian, features)


def _kept_or_measured(
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
    measured, state = measure(judge, images, protocol, folder, sums, kept)
    if jax.process_index() == 0 and sums:
        references.save(path, measured.moments, made_of(protocol, images))
    state.discard()
    return measured


def made_of(protocol: Protocol, images: ImageStream) -> references.Made:
    return references.Made(
        extractor=protocol.extractor,
        extractor_digest=protocol.extractor_digest,
        resize=protocol.resize,
        quantiser=protocol.quantiser,
        dataset=images.digest,
    )


def open_split(
    config: image_data.ImagesConfig, name: str, chosen: np.ndarray | None = None
) -> ImageStream:
    """A split of a run's images, or the `chosen` of them."""
    source = image_data.open_images(config, name, augment=False)
    chosen = np.arange(len(source), dtype=np.int64) if chosen is None else chosen

    def read(indices: np.ndarray) -> np.ndarray:
        if not len(indices):
            return np.zeros((0, config.resolution, config.resolution, 3), np.uint8)
        rows = chosen[indices]
        return source.read(rows, rows)["image"]

    digest = f"{name}:{len(chosen)}:{source.fingerprint()}"
    return ImageStream(len(chosen), lambda rows: read, f"the {name} images", digest)
