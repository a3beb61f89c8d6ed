"""A small image classifier whose penultimate features measure samples of small images.

Not an image network of the literature: it serves data sets that no published extractor fits, such
as handwritten digits, and is trained on the very images it judges.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError
from ldm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Three 3x3 convolutions of stride 2, then two dense layers."""

    resolution: int = 32  # image side, a multiple of 4
    image_channels: int = 3
    num_classes: int = 10
    width: int = 16  # channels of the first convolution; the next two have twice as many
    feature_dim: int = 64  # F, the width of the features

    def __post_init__(self):
        if self.resolution < 8 or self.resolution % 4:
            raise InputError(
                f"classifier resolution {self.resolution} must be a multiple of 4 and at least 8; "
                "resize the images"
            )


def _shapes(config):
    """Kernel shape and logical axes of each layer, in the order of the forward pass."""
    width, side = config.width, config.resolution
    for _ in range(3):
        side = -(-side // 2)
    convolution = (None, None, "in_channels", "out_channels")
    dense = ("in_channels", "out_channels")
    return {
        "conv1": ((3, 3, config.image_channels, width), convolution),
        "conv2": ((3, 3, width, 2 * width), convolution),
        "conv3": ((3, 3, 2 * width, 2 * width), convolution),
        "features": ((side * side * 2 * width, config.feature_dim), dense),
        "logits": ((config.feature_dim, config.num_classes), dense),
    }


def init(config: ClassifierConfig, key: jax.Array) -> Any:
    """Parameters as a nested dict of f32 arrays: kernels uniform, variance 2 / fan-in; biases 0."""
    shapes = {name: shape for name, (shape, _) in _shapes(config).items()}
    # One draw for all: each further one would cost half a second of compilation on a CPU.
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    draws = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1.0), ends[:-1])
    return {
        name: {
            "kernel": draw.reshape(shape) * math.sqrt(6 / math.prod(shape[:-1])),
            "bias": jnp.zeros(shape[-1]),
        }
        for (name, shape), draw in zip(shapes.items(), draws, strict=True)
    }


def axes(config: ClassifierConfig) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return {
        name: {"kernel": names, "bias": names[-1:]} for name, (_, names) in _shapes(config).items()
    }


def apply(config: ClassifierConfig, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images f32 [B,H,W,C] in [-1,1] -> (logits [B,num_classes], features [B,F] of unit RMS).

    Raises InputError for images of another shape than the configured one.
    """
    shape = (config.resolution, config.resolution, config.image_channels)
    if x.shape[1:] != shape:
        raise InputError(
            f"images of shape {tuple(x.shape[1:])} for a classifier of {shape}; resize the images "
            "or train a classifier for them"
        )
    x = constrain(x, "batch", "height", "width", "channels")
    for name in ("conv1", "conv2", "conv3"):
        x = jax.nn.relu(_convolve(params[name], x))  # halves H and W
    x = _dense(params["features"], x.reshape(len(x), -1))
    # Root mean square 1: distances then share one scale whatever the seed or training time.
    features = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return _dense(params["logits"], features), features


def _convolve(p, x):
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p["bias"].reshape(1, 1, 1, -1)


def _dense(p, x):
    return x @ p["kernel"] + p["bias"].reshape(1, -1)
