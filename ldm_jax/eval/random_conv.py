"""Features of a small convolutional network with random weights: an extractor that needs no file.

It sees texture, edges and coarse position, nothing of what a picture shows. Figures are comparable
for one seed and one image size only.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError
from ldm_jax.keys import key_for

WIDTHS = (16, 32, 64)  # channels of the three convolutions, of strides 1, 2 and 2
DIM = 4 * WIDTHS[-1]  # of the features


def init(seed: int) -> Any:
    """Parameters as a nested dict of f32 arrays; kernels normal of variance 2 / fan-in, no biases.

    He et al., ICCV 2015, eq. 10.
    """
    shapes = [(3, 3, i, o) for i, o in itertools.pairwise((3, *WIDTHS))]
    return {
        f"conv{n}": jax.random.normal(key_for(seed, "random_conv", n), shape)
        * math.sqrt(2 / math.prod(shape[:-1]))
        for n, shape in enumerate(shapes, 1)
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Images f32 [B,H,W,3] in [-1,1] -> features f32 [B,256]: means over the four quarters."""
    if x.ndim != 4 or min(x.shape[1:3]) < 8 or x.shape[-1] != 3:
        raise InputError(
            f"images of shape {tuple(x.shape)}: the rule is [B,H,W,3] of at least 8 pixels a side"
        )
    for name, stride in (("conv1", 1), ("conv2", 2), ("conv3", 2)):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x,
                params[name],
                (stride, stride),
                [(1, 1), (1, 1)],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=jax.lax.Precision.HIGHEST,
            )
        )
    h, w = x.shape[1] // 2, x.shape[2] // 2
    quarters = [x[:, :h, :w], x[:, :h, w:], x[:, h:, :w], x[:, h:, w:]]
    return jnp.concatenate([q.mean((1, 2)) for q in quarters], -1)
