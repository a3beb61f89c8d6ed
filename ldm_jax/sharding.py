"""Meshes and shardings: logical axis names on arrays, mesh axes underneath.

Models name the axes of their parameters and activations; `RULES` says which mesh axes carry each
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

from ldm_jax.errors import InputError, divides

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: int = -1  # replicas of the parameters, each with its own slice of the batch
    fsdp: int = 1  # shards of parameters, optimizer and EMA; slices the batch as well
    tensor: int = 1  # splits attention heads and hidden widths


# Logical axis name -> mesh axes.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "in_channels": ("fsdp",),
    "out_channels": ("tensor",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": (),
    "height": (),
    "width": (),
    "tokens": (),
    "channels": (),
}


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes that carry a logical one; ValueError for a name that RULES lacks."""
    if name is not None and name not in RULES:
        raise ValueError(f"unknown logical axis {name!r}; known: {list(RULES)}")
    return RULES[name] if name else ()


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


_active: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """While open, `constrain` speaks of `mesh`; enter it inside the function being traced."""
    token = _active.set(mesh)
    try:
        yield
    finally:
        _active.reset(token)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": that of the mesh in use, and the host's where none is."""
    mesh = _active.get()
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def active_batch_shards() -> int:
    """In how many parts the mesh in use cuts a batch; 1 where none is."""
    mesh = _active.get()
    return batch_shards(mesh) if mesh is not None else 1


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the axes of `x` to the mesh by logical name; the identity when no mesh is in use.

    Raises ValueError for a name that RULES lacks, and for a wrong number of names.
    """
    if len(names) != x.ndim:
        raise ValueError(f"{len(names)} axis names {names} for an array of shape {x.shape}")
    mesh, axes = _active.get(), [mesh_axes(name) for name in names]
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[a or None for a in axes])))


def spec_for(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> P:
    """The partition of one parameter, from its logical axis names.

    A mesh axis is used only where it divides the dimension. Where the name that should carry `fsdp`
    does not divide, the largest free dimension that does takes it, so that large parameters never
    stay whole by accident.
    """
    entries: list[tuple[str, ...]] = []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        axes = tuple(a for a in mesh_axes(name) if mesh.shape[a] > 1 and a not in used)
        if size % math.prod(mesh.shape[a] for a in axes):
            axes = ()
        entries.append(axes)
        used.update(axes)
    wanted = any("fsdp" in mesh_axes(name) for name in names)
    if wanted and mesh.shape["fsdp"] > 1 and "fsdp" not in used:
        free = [i for i, e in enumerate(entries) if not e and shape[i] % mesh.shape["fsdp"] == 0]
        if free:
            entries[max(free, key=lambda i: shape[i])] = ("fsdp",)
    return P(*[e or None for e in entries])


def param_shardings(axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding per parameter; `axes` holds a tuple of names for each leaf of `shapes`."""
    return jax.tree.map(
        lambda leaf, names: NamedSharding(mesh, spec_for(names, leaf.shape, mesh)),
        shapes,
        axes,
    )


def abstract_params(init: Callable[[jax.Array], Any], axes: Any, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the parameters that `init` makes from a key; none are made."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return placed(shapes, param_shardings(axes, shapes, mesh))


def placed(shapes: Any, shardings: Any) -> Any:
    """Shapes and types with shardings."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def state_shardings(state: Any, axes: Any, mesh: Mesh) -> Any:
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
                return NamedSharding(mesh, spec_for(names, leaf.shape, mesh))
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over every mesh axis that carries the batch; the other axes whole."""
    return NamedSharding(mesh, P(RULES["batch"]))


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def fitting_batch(count: int, mesh: Mesh) -> int:
    """The smallest batch size of at least `count` that divides over the mesh."""
    shards = batch_shards(mesh)
    return -(-count // shards) * shards


def check_batch(batch_size: int, mesh: Mesh, name: str = "batch_size", parts: int = 1) -> None:
    """Raises InputError unless each of `parts` of the global batch divides over the mesh."""
    axes = " x ".join(f"{a}={mesh.shape[a]}" for a in RULES["batch"])
    split = f", accumulate={parts}" if parts > 1 else ""
    divides(name, batch_size, parts * batch_shards(mesh), f"{axes} devices{split}")


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


def over_batches(function: Callable[[Any], Any], rows: Any, mesh: Mesh, size: int) -> Any:
    """A function of batch-sharded arrays [size, ...] of all `rows` [N, ...]: host arrays [N, ...].

    `size` divides over the mesh; the last batch is filled up with copies, so that one program
    serves any N. Every process must call it, with the same rows, and gets all results.
    """
    index, count = process_slice(size, mesh)
    local = np.arange(size).reshape(count, -1)[index]
    num = len(jax.tree.leaves(rows)[0])

    def results(start: int) -> Any:
        at = np.minimum(start + local, num - 1)
        batch = put_batch(jax.tree.map(lambda x: x[at], rows), mesh, size)
        return jax.tree.map(host_array, function(batch))

    parts = [results(start) for start in range(0, num, size)]
    return jax.tree.map(lambda *x: np.concatenate(x)[:num], *parts)


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the call of this name."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def anywhere(here: bool) -> bool:
    """Whether it is true on any process; every process must call it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.bool_(here))))
    return here


def host_array(x: jax.Array) -> np.ndarray:
    """The whole of a (possibly sharded) array on this host; every process must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
