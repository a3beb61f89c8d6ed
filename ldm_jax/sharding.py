"""Meshes and shardings: logical axis names on arrays, mesh axes underneath.

Models name the axes of their parameters and activations; `Rules` says which mesh axes carry each
name; nothing else in the project knows where an array lives.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ldm_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1  # replicas of the parameters, each with its own slice of the batch
    fsdp: int = 1  # shards of parameters, optimizer and EMA; slices the batch as well
    tensor: int = 1  # splits attention heads and hidden widths


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis name -> mesh axes. A name that is not a field here raises."""

    batch: tuple[str, ...] = ("data", "fsdp")
    in_channels: tuple[str, ...] = ("fsdp",)
    out_channels: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    hidden: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ()
    height: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        if name is None:
            return ()
        known = [f.name for f in dataclasses.fields(self)]
        if name not in known:
            raise ValueError(f"unknown logical axis {name!r}; known: {known}")
        return getattr(self, name)


RULES = Rules()


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh over `devices` (all of them when None); raises InputError when sizes do not fit."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    named = dict(zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise InputError(f"mesh {named}: sizes are positive, and at most one is -1 (fill)")
    rest = math.prod(s for s in sizes if s != -1)
    if len(devices) % rest or (-1 not in sizes and rest != len(devices)):
        raise InputError(
            f"mesh {named} does not fit {len(devices)} devices: the product must equal the device "
            "count; set one size to -1 to fill"
        )
    sizes = [len(devices) // rest if s == -1 else s for s in sizes]
    return jax.make_mesh(tuple(sizes), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """While open, `constrain` speaks of `mesh`; enter it inside the function being traced."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use, and the host's own where none is."""
    active = _active.get()
    return active[0].devices.flat[0].platform if active else jax.default_backend()


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the axes of `x` to the mesh by logical name; the identity when no mesh is in use.

    Raises ValueError for a name that Rules does not know, and for a wrong number of names.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    active = _active.get()
    mesh, rules = active if active else (None, RULES)
    axes = [rules.mesh_axes(name) for name in names]
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[a or None for a in axes])))


def spec_for(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = RULES
) -> P:
    """The partition of one parameter, from its logical axis names.

    A mesh axis is used only where it divides the dimension. Where the name that should carry `fsdp`
    does not divide, the largest free dimension that does takes it, so that large parameters never
    stay whole by accident.
    """
    entries: list[tuple[str, ...]] = []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in rules.mesh_axes(name) if mesh.shape[a] > 1 and a not in used)
        if size % math.prod(mesh.shape[a] for a in axes):
            axes = ()
        entries.append(axes)
        used.update(axes)
    wanted = any("fsdp" in rules.mesh_axes(name) for name in names)
    if wanted and mesh.shape["fsdp"] > 1 and "fsdp" not in used:
        free = [i for i, e in enumerate(entries) if not e and shape[i] % mesh.shape["fsdp"] == 0]
        if free:
            entries[max(free, key=lambda i: shape[i])] = ("fsdp",)
    return P(*[e or None for e in entries])


def param_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A NamedSharding per parameter; `axes` holds a tuple of names for each leaf of `shapes`."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules)),
        shapes,
        axes,
    )


def abstract_params(init: Callable[[jax.Array], Any], axes: Any, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the parameters that `init` makes from a key; none are made."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        param_shardings(axes, shapes, mesh),
    )


def state_shardings(state: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings for a whole train state, derived from the parameters' logical axes alone.

    `state` is a tree of shapes. A leaf whose path ends with the path of a parameter and that has
    the same rank (parameters, EMA, optimizer moments) is sharded like it; the rest is replicated.
    """

    def is_names(x):
        return isinstance(x, tuple) and all(n is None or isinstance(n, str) for n in x)

    by_path = {
        tuple(key_name(k) for k in path): names
        for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)
    }
    depths = {len(path) for path in by_path}

    def sharding(path, leaf):
        keys = tuple(key_name(k) for k in path)
        for depth in depths:
            names = by_path.get(keys[-depth:])
            if names is not None and len(names) == len(leaf.shape):
                return NamedSharding(mesh, spec_for(names, leaf.shape, mesh, rules))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def key_name(key: Any) -> str:
    """The plain text of one key of a tree path, whatever kind of node it came from."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The leading axis over every mesh axis that carries the batch; the other axes whole."""
    return NamedSharding(mesh, P(rules.batch))


def check_batch(
    batch_size: int,
    mesh: Mesh,
    name: str = "batch_size",
    rules: Rules = RULES,
    parts: int = 1,
) -> None:
    """Raises InputError unless each of `parts` of the global batch divides over the mesh."""
    ways = parts * math.prod(mesh.shape[a] for a in rules.batch)
    if batch_size < 1 or batch_size % ways:
        nearest = max(1, round(batch_size / ways)) * ways
        split = f", accumulate={parts}" if parts > 1 else ""
        raise InputError(
            f"{name} {batch_size} must divide by {ways} "
            f"({' x '.join(f'{a}={mesh.shape[a]}' for a in rules.batch)} devices{split}); "
            f"nearest: {nearest}"
        )


def process_slice(batch_size: int, mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process holds slice `index` of `count` equal contiguous batch slices."""
    shards = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = sorted({s[0].indices(batch_size)[:2] for s in shards.values()})
    start, stop = rows[0][0], rows[-1][1]
    size = stop - start
    if sum(b - a for a, b in rows) != size or batch_size % size or start % size:
        raise InputError(
            f"the mesh {dict(mesh.shape)} gives this process the batch rows {rows}: they must "
            "be one aligned block; let a process have neighbouring `data` x `fsdp` devices"
        )
    return start // size, batch_size // size


def put_batch(local: Any, mesh: Mesh, batch_size: int) -> Any:
    """Joins every process's rows (host arrays, leading axis) into global, batch-sharded arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(
            sharding, np.asarray(a), (batch_size, *np.shape(a)[1:])
        ),
        local,
    )


def host_array(x: jax.Array) -> np.ndarray:
    """The whole of a (possibly sharded) array on this host; every process must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
