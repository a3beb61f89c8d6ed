"""LPIPS (Zhang et al., CVPR 2018): how different two images look to a VGG16, frozen.

The weights come from a file: `ldm weights lpips --from=FILE` makes one of those that are published.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.models.frozen.vit import channel_row, leaf, normalised
from ldm_jax.sharding import constrain

# Convolutions of VGG16 by block; LPIPS looks at the last activation of each.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# ImageNet's mean and deviation, re-expressed for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # added to the norm of a pixel's features


def shapes() -> dict[str, Any]:
    """The tree of parameters as shapes: those of the trunk, and lin{block} weights."""
    lines = {f"lin{b}": leaf(widths[-1]) for b, widths in enumerate(BLOCKS)}
    return trunk_shapes() | lines


def axes() -> dict[str, Any]:
    """The tree of `shapes` with a tuple of logical axis names for each parameter."""

    def names(shape: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        return (None, None, "in_channels", "out_channels") if shape.ndim == 4 else (None,)

    return jax.tree.map(names, shapes())


def trunk_shapes() -> dict[str, Any]:
    """Shapes of what `features` needs: kernels and biases of conv{block}_{i}."""
    tree: dict[str, Any] = {}
    c_in = 3
    for b, widths in enumerate(BLOCKS):
        for i, width in enumerate(widths):
            tree[f"conv{b}_{i}"] = {"kernel": leaf(3, 3, c_in, width), "bias": leaf(width)}
            c_in = width
    return tree


def features(params: Any, x: jax.Array) -> list[jax.Array]:
    """Images f32 [B,H,W,3] in [-1,1] -> five maps [B,H/2^i,W/2^i,C_i], f32."""
    h = normalised(constrain(x, "batch", "height", "width", "channels"), SHIFT, SCALE)
    maps = []
    for b, widths in enumerate(BLOCKS):
        if b:
            h = max_pool(h)
        for i in range(len(widths)):
            p = params[f"conv{b}_{i}"]
            # Gathered at its use, as in models/layers.py.
            kernel = constrain(p["kernel"], None, None, None, None)
            h = jax.lax.conv_general_dilated(
                h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            h = jax.nn.relu(h + channel_row(p["bias"]))
        maps.append(h)
    return maps


def lpips(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The distance of images f32 [B,H,W,3] in [-1,1], f32 [B]; sides of at least 16 pixels.

    No dropout: the published training left that of the linear layers on, which adds noise alone.
    """
    assert min(x.shape[1:3]) >= 16, f"LPIPS pools images {x.shape} of under 16 pixels to nothing"
    distance = jnp.zeros(x.shape[0])
    pairs = zip(features(params, x), features(params, y), strict=True)
    for b, (of_x, of_y) in enumerate(pairs):
        difference = jnp.square(_unit(of_x) - _unit(of_y))
        distance += jnp.einsum("bhwc,c->bhw", difference, params[f"lin{b}"]).mean((1, 2))
    return distance


def _unit(h):
    # The root has no gradient at 0, where a pixel excites nothing.
    square = jnp.square(h).sum(-1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return h / (norm + EPSILON)


def max_pool(h: jax.Array) -> jax.Array:
    """The maximum of 2x2 at stride 2, [B,H,W,C] -> [B,H//2,W//2,C]."""
    b, height, width, c = h.shape
    h = h[:, : height // 2 * 2, : width // 2 * 2]
    return h.reshape(b, height // 2, 2, width // 2, 2, c).max((2, 4))
