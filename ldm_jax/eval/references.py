"""Statistics of real images: everybody's files in, our own out; refused before any work is done."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import files
from ldm_jax.errors import InputError
from ldm_jax.eval import array_pickle
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.protocol import Protocol

SCHEMA = 1
POOL, SPATIAL, CLS = "2048", "spatial2023", "cls"
MAX_WIDTH = 16_384  # features; a covariance of more would not fit beside others
ASYMMETRY = 1e-5  # of the largest entry: f32 products over 50 000 images
NEGATIVE = 1e-4  # of the largest eigenvalue: what f32 makes of a zero
# Tap -> the names of mean and covariance, in the files of ADM, torch-fidelity, TTUR and EDM, and
# in those of the MeanFlow family.
NAMES = {
    POOL: (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    SPATIAL: (("mu_s", "sigma_s"),),
    CLS: (("mu_cls", "sigma_cls"),),
}
PICKLED = {"fid": POOL, "fd_dinov2": CLS}  # EDM2


class MeanCovariance(NamedTuple):
    mean: np.ndarray  # f64 [D]
    covariance: np.ndarray  # f64 [D,D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """How our own statistics were made; files with the same may be merged."""

    extractor: str
    extractor_digest: str  # sha256 hex of its weights
    resize: str
    quantiser: str
    dataset: str  # an id, such as the sha256 of the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a file says of the features of its images."""

    path: str
    sha256: str  # hex, of the file
    num: int  # images behind the statistics; 0 = the file does not say
    gaussians: Mapping[str, MeanCovariance]  # tap -> what a Fréchet distance needs
    moments: Mapping[str, Moments]  # tap -> what adds up; of our own files only
    made: Made | None  # of our own files only

    def gaussian(self, tap: str, width: int = 0) -> MeanCovariance:
        """Of one tap; InputError where the file lacks it or has it of another width (0 = any)."""
        if tap not in self.gaussians:
            raise InputError(
                f"reference {self.path} has statistics of {sorted(self.gaussians)}, not of "
                f"{tap!r}; give another file, or leave out the metrics of {tap!r}"
            )
        found = self.gaussians[tap]
        if width and found.mean.size != width:
            raise InputError(
                f"reference {self.path}: {tap!r} has {found.mean.size} features, but the samples' "
                f"network has {width}; give statistics of the same network"
            )
        return found


def load(path: str | os.PathLike, *, allow_few: bool = False) -> Statistics:
    """Statistics from .npz (ours, ADM, torch-fidelity, TTUR, EDM, MeanFlow) or EDM2's .pkl.

    Raises InputError for statistics that are none, and, unless `allow_few`, for those of no more
    images than features.
    """
    digest = files.sha256(path)
    if Path(path).suffix == ".pkl":
        num, pairs, moments, made = _from_pickle(path)
    else:
        num, pairs, moments, made = _from_npz(path)
    if not pairs:
        raise InputError(
            f"reference {path} holds no statistics (mu and sigma, or ref_mu and ref_sigma); give a "
            "file of statistics, or make one of its images"
        )
    checked = {tap: _check(path, tap, *pair) for tap, pair in pairs.items()}
    for tap, one in checked.items():
        if num and not allow_few:
            check_enough(num, one.mean.size, f"reference {path}, {tap!r}")
    return Statistics(
        path=str(path), sha256=digest, num=num, gaussians=checked, moments=moments, made=made
    )


def save(path: str | os.PathLike, moments: Mapping[str, Moments], made: Made) -> None:
    """Our own .npz: sums that merge, beside mu and sigma by the names that other tools read."""
    counts = {m.count for m in moments.values()}
    assert len(counts) == 1, f"taps of different numbers of images: {counts}"
    header = {"schema": SCHEMA, "num": counts.pop(), **dataclasses.asdict(made)}
    arrays = {"header": np.array(json.dumps(header, sort_keys=True))}
    for tap, one in moments.items():
        mu, sigma = _names(tap)
        arrays |= {mu: one.mean, sigma: one.covariance}
        arrays |= {f"{tap}/n": np.int64(one.count), f"{tap}/sum": one.total}
        arrays |= {f"{tap}/outer": one.outer}
    files.write_npz(path, arrays)


def merge(first: Statistics, second: Statistics) -> dict[str, Moments]:
    """The sums of two of our own files together; InputError where they were made differently."""
    if first.made is None or second.made is None:
        other = first if first.made is None else second
        raise InputError(f"reference {other.path} is not our own: only sums merge, which it lacks")
    for field in dataclasses.fields(Made):
        a, b = (getattr(r.made, field.name) for r in (first, second))
        if a != b and field.name != "dataset":
            raise InputError(
                f"references {first.path} and {second.path} do not merge: {field.name} is {a!r} "
                f"and {b!r}; make both the same way"
            )
    if {*first.moments} != {*second.moments}:
        raise InputError(f"references {first.path} and {second.path} have different taps")
    return {tap: one.merge(second.moments[tap]) for tap, one in first.moments.items()}


def refuse_other_features(statistics: Statistics, protocol: Protocol) -> None:
    """InputError where our own statistics were made by another network or resize than samples are.

    Foreign files do not say how they were made: there the user's word stands.
    """
    for name in ("extractor", "extractor_digest", "resize") if statistics.made else ():
        have, want = getattr(statistics.made, name), getattr(protocol, name)
        if have != want:
            raise InputError(
                f"reference {statistics.path} was made with {name} {have!r}, but the samples would "
                f"be measured with {want!r}; make the reference anew, or evaluate as it was made"
            )


def check_enough(num: int, width: int, what: str) -> None:
    """InputError unless a covariance of `width` features can have full rank from `num` images."""
    if num <= width:
        raise InputError(
            f"{what}: {num} images for {width} features make a singular covariance, and a Fréchet "
            f"distance that measures the number of images; take at least {width + 1} (published "
            "figures have 50000), or give --allow-few"
        )


def _names(tap: str) -> tuple[str, str]:
    return NAMES[tap][0] if tap in NAMES else (f"mu_{tap}", f"sigma_{tap}")


def _from_npz(path):
    headers = files.headers(path)
    for name, header in headers.items():
        if name.startswith(("mu", "sigma", "ref_")) or "/" in name:
            _check_size(path, name, header.shape)
    if "header" in headers:
        return _from_ours(path, headers)
    pairs = {}
    for tap, spellings in NAMES.items():
        for mu, sigma in spellings:
            if mu in headers and sigma in headers:
                arrays = files.read_npz(path, mu, sigma)
                pairs.setdefault(tap, (arrays[mu], arrays[sigma]))
    return 0, pairs, {}, None


def _from_ours(path, headers):
    if headers["header"].dtype.kind != "U" or headers["header"].dtype.itemsize > 1 << 16:
        raise InputError(f"{path}: its header is no text; the file is damaged, make it anew")
    try:
        header = json.loads(str(files.read_npz(path, "header")["header"]))
        version, num = header.pop("schema"), int(header.pop("num"))
        if version != SCHEMA:
            raise InputError(
                f"{path} has schema {version!r}, this program reads {SCHEMA}; make it anew"
            )
        made = Made(**header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its header is damaged ({error}); make it anew") from error
    pairs, moments = {}, {}
    for tap in sorted(name.removesuffix("/sum") for name in headers if name.endswith("/sum")):
        mu, sigma = _names(tap)
        names = (f"{tap}/n", f"{tap}/sum", f"{tap}/outer", mu, sigma)
        n, total, outer, mean, covariance = files.read_npz(path, *names).values()
        agree = outer.shape == (*total.shape, *total.shape) and total.shape == mean.shape
        if not agree or int(n) != num or not np.allclose(total, n * mean, rtol=1e-9, atol=0):
            raise InputError(f"{path}: sums and mean of {tap!r} disagree; make it anew")
        moments[tap] = Moments(int(n), total, outer)
        pairs[tap] = (mean, covariance)
    return num, pairs, moments, made


def _from_pickle(path):
    content = array_pickle.read(path)
    if not isinstance(content, dict):
        raise InputError(f"reference {path} must be a dict of statistics, as EDM2 writes them")
    pairs = {}
    for name, tap in PICKLED.items():
        part: Any = content.get(name)
        if isinstance(part, dict) and {"mu", "sigma"} <= part.keys():
            pairs[tap] = (np.asarray(part["mu"]), np.asarray(part["sigma"]))
    num = content.get("num_images", 0)
    return int(num) if isinstance(num, int | np.ndarray) else 0, pairs, {}, None


def _check_size(path, name, shape):
    if len(shape) > 2 or max(shape, default=0) > MAX_WIDTH:
        raise InputError(
            f"{path}: {name} is {shape}: statistics are [D] and [D,D] of at most {MAX_WIDTH} "
            "features; give another file"
        )


def _check(path, tap, mean, covariance) -> MeanCovariance:
    """f64, or InputError where it cannot be the mean and the covariance of anything."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    kinds = mean.dtype.kind + covariance.dtype.kind
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or kinds != "ff":
        raise InputError(
            f"{path}, {tap!r}: mean {mean.dtype} {mean.shape} and covariance {covariance.dtype} "
            f"{covariance.shape}: the rule is floats [D] and [D,D]; give another file"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (mean.size and np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{path}, {tap!r}: values are not finite; give another file")
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * largest:
        raise InputError(f"{path}, {tap!r}: the covariance is not symmetric; give another file")
    values = np.linalg.eigvalsh(covariance)
    if values[0] < -NEGATIVE * max(values[-1], 0.0):
        raise InputError(
            f"{path}, {tap!r}: the covariance has the negative eigenvalue {values[0]:.3g} beside "
            f"{values[-1]:.3g}; give another file"
        )
    return MeanCovariance(mean, covariance)
