"""CLIP's vision and text transformers, each with its projection into the common space.

Radford et al., ICML 2021; the published ones use the "quick" GELU x * sigmoid(1.702 x). Token ids
are the caller's: byte-pair encoding is not part of the network.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models.frozen import vit

EPSILON = 1e-5
# The mean and deviation of its training images, in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Tower:
    """A transformer whose MLPs are four times as wide."""

    width: int
    layers: int
    heads: int


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    vision: Tower
    text: Tower
    resolution: int  # image side in pixels
    patch: int  # pixels
    embed_dim: int  # E, of the common space
    vocabulary: int = 49408
    context: int = 77  # tokens at most


VIT_B32 = ClipConfig(Tower(768, 12, 12), Tower(512, 12, 8), 224, 32, 512)
VIT_L14_336 = ClipConfig(Tower(1024, 24, 16), Tower(768, 12, 12), 336, 14, 768)


def shapes(config: ClipConfig) -> dict[str, Any]:
    """The tree of parameters as shapes; parameters of blocks are stacked over the layers."""
    vision, text = config.vision, config.text
    tokens = (config.resolution // config.patch) ** 2 + 1
    return {
        "vision": {
            "patch": vit.leaf(config.patch, config.patch, 3, vision.width),
            "class": vit.leaf(vision.width),
            "position": vit.leaf(tokens, vision.width),
            "norm_in": vit.norm_shapes(vision.width),
            "blocks": vit.block_shapes(vision.width, 4 * vision.width, vision.layers),
            "norm_out": vit.norm_shapes(vision.width),
            "projection": vit.leaf(vision.width, config.embed_dim),
        },
        "text": {
            "token": vit.leaf(config.vocabulary, text.width),
            "position": vit.leaf(config.context, text.width),
            "blocks": vit.block_shapes(text.width, 4 * text.width, text.layers),
            "norm_out": vit.norm_shapes(text.width),
            "projection": vit.leaf(text.width, config.embed_dim),
        },
    }


def image_features(config: ClipConfig, params: Any, x: jax.Array) -> jax.Array:
    """Images f32 [B,R,R,3] in 0..255, R the resolution -> f32 [B,E], not normalised."""
    side = config.resolution
    assert x.shape[1:] == (side, side, 3), f"CLIP takes images of {side} pixels, not {x.shape}"
    p = params["vision"]
    with jax.default_matmul_precision("highest"):  # else accelerators round to bf16 or TF32
        h = vit.patches(p["patch"], vit.normalised(x / 255.0, MEAN, STD))
        first = jnp.broadcast_to(p["class"].reshape(1, 1, -1), (len(x), 1, h.shape[-1]))
        h = jnp.concatenate([first, h], 1) + p["position"][None]
        h = vit.norm(p["norm_in"], h, EPSILON)
        h = _blocks(p, h, config.vision)
        return vit.norm(p["norm_out"], h[:, 0], EPSILON) @ p["projection"]


def text_features(config: ClipConfig, params: Any, tokens: jax.Array) -> jax.Array:
    """Token ids int32 [B,T] -> f32 [B,E], not normalised; read at the first of the largest id.

    That is the end of the text, the last entry of the vocabulary; what stands behind it counts
    nothing.
    """
    assert tokens.shape[1] <= config.context, f"{tokens.shape[1]} tokens, at most {config.context}"
    p = params["text"]
    with jax.default_matmul_precision("highest"):
        h = p["token"][tokens] + p["position"][None, : tokens.shape[1]]
        h = _blocks(p, h, config.text, causal=True)
        end = jnp.take_along_axis(h, tokens.argmax(-1)[:, None, None], 1)[:, 0]
        return vit.norm(p["norm_out"], end, EPSILON) @ p["projection"]


def _blocks(p, h, tower, causal=False):
    return vit.blocks(
        p["blocks"],
        h,
        heads=tower.heads,
        activation=lambda x: x * jax.nn.sigmoid(1.702 * x),
        epsilon=EPSILON,
        causal=causal,
    )
