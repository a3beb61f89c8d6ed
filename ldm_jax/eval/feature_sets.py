"""Sets of features [N,D] as every metric takes them: checked at the door, walked over in blocks."""

from collections.abc import Iterator

import numpy as np

from ldm_jax.errors import InputError

BLOCK = 2048  # rows at a time: a square tile of f64 then takes 34 MB


def checked(features: np.ndarray, least: int = 1, name: str = "features") -> np.ndarray:
    """`features` as a floating array [N,D] of at least `least` rows; raises InputError otherwise.

    A value that is not finite is an error too.
    """
    x = np.asarray(features)
    if x.dtype.kind != "f" or x.ndim != 2 or not x.shape[1]:
        raise InputError(f"{name} {x.dtype} {x.shape}: the rule is floating point numbers [N,D]")
    if len(x) < least:
        raise InputError(f"{name} of {len(x)} images: at least {least} are needed; take more")
    bad = sum(np.count_nonzero(~np.isfinite(x[rows]).all(1)) for rows in blocks(len(x), BLOCK))
    if bad:
        raise InputError(
            f"{name} of {bad} of {len(x)} images are not finite; look at the images and at the "
            "network that made them"
        )
    return x


def checked_pair(
    first: np.ndarray,
    second: np.ndarray,
    least: int = 1,
    names: tuple[str, str] = ("first", "second"),
) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as `checked` returns them; raises InputError where their widths differ too."""
    pair = [
        checked(x, least, f"{name} features")
        for x, name in zip((first, second), names, strict=True)
    ]
    if pair[0].shape[1] != pair[1].shape[1]:
        raise InputError(
            f"{names[0]} and {names[1]} features of {pair[0].shape[1]} and {pair[1].shape[1]} "
            "values differ; take both from one network and one layer"
        )
    return pair[0], pair[1]


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(count)."""
    if size < 1:
        raise InputError(f"blocks of {size} rows: the rule is 1 or more; leave it out")
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
