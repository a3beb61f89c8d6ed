"""A whole denoiser: conditions and backbone behind the seam that samplers and losses speak to."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.models import conditions, unet
from ldm_jax.models.conditions import CONDITIONS, Cond, Condition, Widths
from ldm_jax.sharding import key_name


class Backbone(NamedTuple):
    """A network that denoises, as functions of its configuration; `widths` are its signals'."""

    config: type  # its fields in_channels and out_channels are those of z_t and the prediction
    init: Callable[..., Any]  # (config, key, widths) -> params
    axes: Callable[..., Any]  # (config, widths) -> logical names of the tree of `init`
    apply: Callable[..., jax.Array]  # (config, params, z_t, t, signals) -> prediction
    edges: tuple[str, ...]  # names of its first and last layers, which Muon leaves to AdamW


BACKBONES: dict[str, Backbone] = {
    "unet": Backbone(unet.UNetConfig, unet.init, unet.axes, unet.apply, unet.EDGES),
}


def backbone_configs() -> dict[str, type]:
    """Kind -> what configures it."""
    return {kind: backbone.config for kind, backbone in BACKBONES.items()}


def condition_configs() -> dict[str, type]:
    """Kind -> what configures it."""
    return CONDITIONS


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    backbone: Any = dataclasses.field(
        default=unet.UNetConfig(), metadata={"kinds": backbone_configs}
    )
    # By name; none is the unconditional model.
    conditions: dict[str, Condition] = dataclasses.field(
        default_factory=dict, metadata={"kinds": condition_configs, "several": True}
    )

    def __post_init__(self):
        conditions.widths(self.conditions)
        conditions.check_names(self.conditions)

    @property
    def widths(self) -> Widths:
        """Of the backbone's signals."""
        return conditions.widths(self.conditions)

    @property
    def network(self) -> Backbone:
        """The row of the backbone."""
        return next(b for b in BACKBONES.values() if isinstance(self.backbone, b.config))


def init(config: DenoiserConfig, key: jax.Array) -> Any:
    """Parameters as nested dicts of f32 arrays: `backbone` and `conditioner`."""
    backbone_key, conditioner_key = jax.random.split(key)
    return {
        "backbone": config.network.init(config.backbone, backbone_key, config.widths),
        "conditioner": conditions.init(config.conditions, conditioner_key),
    }


def axes(config: DenoiserConfig) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {
        "backbone": config.network.axes(config.backbone, config.widths),
        "conditioner": conditions.axes(config.conditions),
    }


def apply(
    config: DenoiserConfig, params: Any, z_t: jax.Array, t: jax.Array, cond: Cond
) -> jax.Array:
    """Prediction f32 [B,H,W,C] from z_t f32 [B,H,W,C], times [B], conditions {name: [B,...]}."""
    signals = conditions.apply(config.conditions, params["conditioner"], cond)
    return config.network.apply(config.backbone, params["backbone"], z_t, t, signals)


def widened(config: DenoiserConfig, params: Any, like: Any, groups: int = 1) -> Any:
    """Parameters of this model but for fewer latent channels, with zeros for the new ones.

    `like` are the shapes of this model's. The output's channels are `groups` of latent ones, each
    of which grows at its end. What was predicted of the old channels does not depend on the new
    ones then, and of those it is 0.
    """

    def grow(path: Any, old: jax.Array, new: Any) -> jax.Array:
        if old.shape == new.shape:
            return old
        names = {key_name(key) for key in path}
        assert names & set(config.network.edges), f"{path} has {old.shape}, not {new.shape}"
        *rest, have = old.shape
        more = [(0, want - n) for n, want in zip(rest, new.shape[:-1], strict=True)]
        split = old.reshape(*rest, groups, have // groups) if have != new.shape[-1] else old
        last = [(0, 0), (0, (new.shape[-1] - have) // groups)] if split is not old else [(0, 0)]
        return jnp.pad(split, [*more, *last]).reshape(new.shape)

    return jax.tree_util.tree_map_with_path(grow, params, like)
