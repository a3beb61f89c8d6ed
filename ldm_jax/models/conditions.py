"""Conditions of a denoiser, a row for each kind: entries of a batch -> signals for its backbone.

A row is a frozen dataclass of its settings with the methods of `Condition`. Several of them work
together: their tokens and maps stand side by side, and their vectors are added up.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError, within
from ldm_jax.sharding import constrain

Cond = dict[str, jax.Array]
"""Entries of a batch, each [B, ...]."""


class Signals(NamedTuple):
    """All inputs of a backbone beside z_t and t; None where there is none of a kind."""

    vector: jax.Array | None = None  # f32 [B,D], added to the embedding of the time
    tokens: jax.Array | None = None  # f32 [B,T,D], attended to
    maps: jax.Array | None = None  # f32 [B,H,W,C], beside the channels of z_t


class Widths(NamedTuple):
    """Last axes of the signals, 0 where there is none of a kind."""

    vector: int = 0
    tokens: int = 0
    maps: int = 0


class Condition(Protocol):
    """What each row knows of itself."""

    @property
    def widths(self) -> Widths: ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example that `read` reads."""
        ...

    def entries(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The entries of a batch that it reads, shapes of one example."""
        ...

    def init(self, key: jax.Array) -> Any:
        """Parameters, a dict whose names no other row has."""
        ...

    def axes(self) -> Any:
        """The tree of `init` with a tuple of logical axis names for each parameter."""
        ...

    def apply(self, params: Any, cond: Cond) -> Signals: ...

    def null(self, batch_size: int) -> Cond:
        """Its entries when it says nothing, [B, ...]; empty for a condition that is always kept."""
        ...

    def read(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """Its entries, host arrays [b, ...], from the fields of a cache's or a source's batch.

        Beside them `position` int64 [b], the examples' places in the stream, seeds what is drawn
        anew at every step, such as masks.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ClassCondition:
    """One learned context token for each class, and one more, id num_classes, for "no class"."""

    num_classes: int = 0
    context_dim: int = 512  # D of the token

    def __post_init__(self):
        if self.num_classes < 1:
            raise InputError(
                f"num_classes {self.num_classes} must be positive for the class condition"
            )
        within("context_dim", self.context_dim, "[1, inf)", "it is the width of a class's token")

    @property
    def widths(self) -> Widths:
        return Widths(tokens=self.context_dim)

    @property
    def fields(self) -> tuple[str, ...]:
        return ("label",)

    def entries(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)}

    def init(self, key: jax.Array) -> Any:
        """Standard normal rows, as published."""
        shape = (self.num_classes + 1, self.context_dim)
        return {"embedding": jax.random.normal(key, shape, jnp.float32)}

    def axes(self) -> Any:
        return {"embedding": ("vocab", "in_channels")}

    def apply(self, params: Any, cond: Cond) -> Signals:
        return Signals(tokens=params["embedding"][cond["label"]][:, None])

    def null(self, batch_size: int) -> Cond:
        return {"label": jnp.full((batch_size,), self.num_classes, jnp.int32)}

    def read(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        return {"label": rows["label"]}


CONDITIONS: dict[str, type] = {"class": ClassCondition}
Conditions = Mapping[str, Condition]


def widths(conditions: Conditions) -> Widths:
    """Of all of them together; raises InputError where tokens or vectors of two do not fit."""
    for kind in ("tokens", "vector"):
        each = {n: getattr(c.widths, kind) for n, c in conditions.items()}
        each = {name: width for name, width in each.items() if width}
        if len(set(each.values())) > 1:
            raise InputError(f"conditions have {kind} of different widths {each}; give them one")
    each = [c.widths for c in conditions.values()]
    return Widths(
        max((w.vector for w in each), default=0),
        max((w.tokens for w in each), default=0),
        sum(w.maps for w in each),
    )


def check_names(conditions: Conditions) -> None:
    """Raises InputError where two rows have parameters of one name, as two of one kind have."""
    owner: dict[str, str] = {}
    for name, condition in conditions.items():
        for parameter in condition.axes():
            first = owner.setdefault(parameter, name)
            if first != name:
                raise InputError(
                    f"conditions {first!r} and {name!r} both have parameters {parameter!r}; "
                    f"leave one out, as with --config.model.conditions.{name}.kind=none"
                )


def entries(conditions: Conditions) -> dict[str, jax.ShapeDtypeStruct]:
    """Everything of a batch that they read, shapes of one example."""
    return {n: spec for c in conditions.values() for n, spec in c.entries().items()}


def read(conditions: Conditions, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Their entries, host arrays, from those of a cache's or a source's batch."""
    return {n: value for c in conditions.values() for n, value in c.read(rows).items()}


def init(conditions: Conditions, key: jax.Array) -> Any:
    """Parameters of all of them in one dict. The first row draws from the key itself."""
    params: dict[str, Any] = {}
    for i, (name, condition) in enumerate(conditions.items()):
        new = condition.init(jax.random.fold_in(key, i) if i else key)
        assert not params.keys() & new.keys(), f"condition {name!r}: names of {sorted(new)} taken"
        params |= new
    return params


def axes(conditions: Conditions) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {n: a for c in conditions.values() for n, a in c.axes().items()}


def apply(conditions: Conditions, params: Any, cond: Cond) -> Signals:
    """What all of them say together."""
    each = [c.apply(params, cond) for c in conditions.values()]
    vectors = [s.vector for s in each if s.vector is not None]
    tokens = [s.tokens for s in each if s.tokens is not None]
    maps = [s.maps for s in each if s.maps is not None]
    return Signals(
        constrain(sum(vectors[1:], vectors[0]), "batch", "channels") if vectors else None,
        constrain(_joined(tokens, 1), "batch", "tokens", "channels") if tokens else None,
        constrain(_joined(maps, -1), "batch", "height", "width", None) if maps else None,
    )


def _joined(arrays: list[jax.Array], axis: int) -> jax.Array:
    return jnp.concatenate(arrays, axis) if len(arrays) > 1 else arrays[0]


def unconditioned(conditions: Conditions, cond: Cond) -> Cond:
    """The same entries saying nothing, but for those of conditions that are always kept."""
    size = len(jax.tree.leaves(cond)[0]) if cond else 0
    null = {n: x for c in conditions.values() for n, x in c.null(size).items()}
    return {**cond, **null}


def drop(conditions: Conditions, cond: Cond, dropped: jax.Array) -> Cond:
    """Entries that say nothing where `dropped` [B] is true."""
    null = unconditioned(conditions, cond)

    def choose(x: jax.Array, nothing: jax.Array) -> jax.Array:
        mask = dropped.reshape(dropped.shape + (1,) * (x.ndim - 1))
        return jnp.where(mask, nothing, x)

    return {n: x if null[n] is x else choose(x, null[n]) for n, x in cond.items()}


def num_classes(conditions: Conditions) -> int:
    """How many classes there are to choose from; 0 for a denoiser that knows none."""
    found = [c.num_classes for c in conditions.values() if isinstance(c, ClassCondition)]
    return found[0] if found else 0
