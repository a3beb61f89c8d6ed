"""Our parameters by their names in other libraries' state dicts; numpy only.

A map is {our path: (their names, transform)}: paths are joined by "/", and a transform turns their
tensors into our array and back. Several names for one path are tensors that we keep in one array.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.errors import InputError


class Transform(NamedTuple):
    to_ours: Callable[..., np.ndarray]  # their tensors, one argument each -> our array
    to_theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # our array -> their tensors


class Entry(NamedTuple):
    theirs: tuple[str, ...]
    transform: Transform


Names = dict[str, Entry]

SAME = Transform(lambda a: a, lambda a: (a,))
CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: (w.transpose(3, 2, 0, 1),))  # OIHW
LINEAR = Transform(lambda w: w.T, lambda w: (w.T,))
# A 1x1 convolution that one side writes as a linear map.
LINEAR_TO_CONV = Transform(lambda w: w.T[None, None], lambda w: (w[0, 0].T,))
CONV_TO_LINEAR = Transform(lambda w: w[:, :, 0, 0].T, lambda w: (w.T[:, :, None, None],))


def qkv_kernel(heads: int) -> Transform:
    """Linear q, k and v [C, C] each <-> one kernel [C, 3C] with columns by head, then q, k, v."""
    return _joined(LINEAR, heads)


def qkv_bias(heads: int) -> Transform:
    """Biases of q, k and v [C] each <-> one bias [3C] by head, then q, k, v."""
    return _joined(SAME, heads)


def _joined(each: Transform, heads: int) -> Transform:
    def to_ours(*qkv):
        parts = [each.to_ours(a) for a in qkv]
        split = [a.reshape(*a.shape[:-1], heads, -1) for a in parts]
        return np.stack(split, axis=-2).reshape(*parts[0].shape[:-1], -1)

    def to_theirs(a):
        split = a.reshape(*a.shape[:-1], heads, 3, -1)
        parts = [split[..., i, :].reshape(*a.shape[:-1], -1) for i in range(3)]
        return tuple(each.to_theirs(part)[0] for part in parts)

    return Transform(to_ours, to_theirs)


def to_ours(names: Names, tensors: Mapping[str, np.ndarray], shapes: Any) -> Any:
    """Their tensors -> our nested dicts of arrays; `shapes` is our tree, of things with a `shape`.

    Raises InputError for tensors that are missing, left over or of another shape.
    """
    ours = flatten(shapes)
    assert names.keys() == ours.keys(), sorted(names.keys() ^ ours.keys())
    expected = {}
    for path, (theirs, transform) in names.items():
        hollow = transform.to_theirs(np.broadcast_to(np.float32(0), ours[path].shape))
        expected |= {name: array.shape for name, array in zip(theirs, hollow, strict=True)}
    _check_tensors(expected, {name: tuple(a.shape) for name, a in tensors.items()})
    return nest(
        {
            path: transform.to_ours(*(np.asarray(tensors[name]) for name in theirs))
            for path, (theirs, transform) in names.items()
        }
    )


def to_theirs(names: Names, params: Any) -> dict[str, np.ndarray]:
    """Our nested dicts of arrays -> their state dict; the inverse of `to_ours`."""
    arrays = flatten(params)
    assert names.keys() == arrays.keys(), sorted(names.keys() ^ arrays.keys())
    tensors: dict[str, np.ndarray] = {}
    for path, (theirs, transform) in names.items():
        tensors |= zip(theirs, transform.to_theirs(np.asarray(arrays[path])), strict=True)
    return tensors


def flatten(tree: Any, separator: str = "/") -> dict[str, Any]:
    """Nested dicts -> {path: leaf}, paths joined by `separator`; a leaf alone has the path ""."""
    if not isinstance(tree, Mapping):
        return {"": tree}
    return {
        f"{name}{separator}{path}" if path else name: leaf
        for name, sub in tree.items()
        for path, leaf in flatten(sub, separator).items()
    }


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dicts; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _check_tensors(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in sorted(expected.items())
            if name in found and found[name] != shape
        ],
    }
    if any(problems.values()):
        reasons = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for what, names in problems.items()
            if names
        )
        raise InputError(
            f"the tensors do not fit the config: {reasons}; choose the config that they were "
            "trained with"
        )
