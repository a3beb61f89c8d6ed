"""What a denoiser is told: raw conditions of a batch -> context tokens for cross-attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError

KINDS = ("none", "class")


@dataclasses.dataclass(frozen=True)
class ConditionerConfig:
    """`class` learns one context token per class and one more, id num_classes, for "no class"."""

    kind: str = "none"
    num_classes: int = 0
    context_dim: int = 512  # D of the context tokens

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"conditioner {self.kind!r} is unknown; choose one of {list(KINDS)}")
        if self.kind == "class" and self.num_classes < 1:
            raise InputError(
                f"num_classes {self.num_classes} must be positive for the class conditioner"
            )


def init(config: ConditionerConfig, key: jax.Array) -> Any:
    """Parameters as a nested dict; standard normal rows, as published."""
    if config.kind == "none":
        return {}
    shape = (config.num_classes + 1, config.context_dim)
    return {"embedding": jax.random.normal(key, shape, jnp.float32)}


def axes(config: ConditionerConfig) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {} if config.kind == "none" else {"embedding": ("vocab", "in_channels")}


def apply(config: ConditionerConfig, params: Any, cond: dict[str, jax.Array]) -> jax.Array | None:
    """{"label": int32 [B]} -> context f32 [B,1,D]; None for the unconditional model."""
    if config.kind == "none":
        return None
    return params["embedding"][cond["label"]][:, None]


def null(config: ConditionerConfig, batch_size: int) -> dict[str, jax.Array]:
    """The condition that says nothing, for guidance and for dropping labels in training."""
    if config.kind == "none":
        return {}
    return {"label": jnp.full((batch_size,), config.num_classes, jnp.int32)}
