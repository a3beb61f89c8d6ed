"""The transformer that CLIP's towers and DINOv2 have in common: blocks with the norm first.

The blocks' parameters are stacked, [L,...] for L blocks, and `lax.scan` runs over them.
Dosovitskiy et al., ICLR 2021.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def channel_row(values: Any) -> jax.Array:
    """A number for each channel, to stand beside images: f32 [1,1,1,C]."""
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


def normalised(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Images [B,H,W,C] less the mean of each channel, over its deviation."""
    return (x - channel_row(mean)) / channel_row(std)


def norm_shapes(*shape: int) -> dict[str, Any]:
    return {"scale": leaf(*shape), "bias": leaf(*shape)}


def block_shapes(width: int, hidden: int, layers: int) -> dict[str, Any]:
    """Shapes of `layers` stacked blocks of `width`, whose MLP has `hidden` units."""

    def dense(c_in, c_out):
        return {"kernel": leaf(layers, c_in, c_out), "bias": leaf(layers, c_out)}

    return {
        "norm1": norm_shapes(layers, width),
        "q": dense(width, width),
        "k": dense(width, width),
        "v": dense(width, width),
        "out": dense(width, width),
        "norm2": norm_shapes(layers, width),
        "fc1": dense(width, hidden),
        "fc2": dense(hidden, width),
    }


def blocks(
    params: Any,
    x: jax.Array,
    *,
    heads: int,
    activation: Callable[[jax.Array], jax.Array],
    epsilon: float,
    causal: bool = False,
) -> jax.Array:
    """[B,T,D] -> [B,T,D]; `scale1` and `scale2` [L,D], where given, multiply each branch."""

    def block(x, p):
        h = _attention(p, norm(p["norm1"], x, epsilon), heads, causal)
        x = x + _scaled(p, "scale1", h)
        h = activation(dense(p["fc1"], norm(p["norm2"], x, epsilon)))
        return x + _scaled(p, "scale2", dense(p["fc2"], h)), None

    return jax.lax.scan(block, x, params)[0]


def patches(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Images [B,H,W,3] -> one vector per patch [B,T,D], row by row; kernel [P,P,3,D]."""
    y = jax.lax.conv_general_dilated(
        x, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(len(x), -1, kernel.shape[-1])


def norm(p: Any, x: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation of the last axis."""
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * _row(p["scale"], x) + _row(p["bias"], x)


def dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + _row(p["bias"], x)


def _attention(p, x, heads, causal):
    b, t, d = x.shape
    q, k, v = (dense(p[name], x).reshape(b, t, heads, d // heads) for name in "qkv")
    y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    return dense(p["out"], y.reshape(b, t, d))


def _scaled(p, name, h):
    return h * _row(p[name], h) if name in p else h


def _row(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
