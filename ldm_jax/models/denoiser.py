"""A whole denoiser: conditioner and backbone behind the seam that samplers and losses speak to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models import conditioners, unet
from ldm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    backbone: unet.UNetConfig = unet.UNetConfig()
    conditioner: conditioners.ConditionerConfig = conditioners.ConditionerConfig()

    @property
    def context_dim(self) -> int:
        """Width of the context tokens; 0 says that the backbone has no cross-attention."""
        return 0 if self.conditioner.kind == "none" else self.conditioner.context_dim


def init(config: DenoiserConfig, key: jax.Array) -> Any:
    """Parameters as nested dicts of f32 arrays: `backbone` and `conditioner`."""
    backbone_key, conditioner_key = jax.random.split(key)
    return {
        "backbone": unet.init(config.backbone, backbone_key, config.context_dim),
        "conditioner": conditioners.init(config.conditioner, conditioner_key),
    }


def axes(config: DenoiserConfig) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {
        "backbone": unet.axes(config.backbone, config.context_dim),
        "conditioner": conditioners.axes(config.conditioner),
    }


def apply(
    config: DenoiserConfig, params: Any, z_t: jax.Array, t: jax.Array, cond: Any
) -> jax.Array:
    """Prediction f32 [B,H,W,C] from z_t f32 [B,H,W,C], times [B], conditions {name: [B,...]}."""
    context = conditioners.apply(config.conditioner, params["conditioner"], cond)
    if context is not None:
        context = constrain(context, "batch", "tokens", "channels")
    return unet.apply(config.backbone, params["backbone"], z_t, t, context)


def condition_names(config: DenoiserConfig) -> tuple[str, ...]:
    """The entries of a batch that tell this denoiser something."""
    return tuple(conditioners.null(config.conditioner, 1))


def drop_condition(config: DenoiserConfig, cond: Any, drop: jax.Array) -> Any:
    """Replaces the condition by the null one where `drop` [B] is true."""
    null = conditioners.null(config.conditioner, drop.shape[0])
    wide = lambda mask, x: mask.reshape(mask.shape + (1,) * (x.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda c, n: jnp.where(wide(drop, c), n, c), cond, null)
