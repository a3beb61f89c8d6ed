"""The blocks that the autoencoder and the denoisers share: Linen modules, none of which leave models/.

Parameters are f32. Convolutions and matrix products run in `dtype`; statistics and softmax in f32.
Kernels and biases start as PyTorch's defaults do, uniform in +-1/sqrt(fan_in), because that is what
the published models were trained from.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError
from ldm_jax.sharding import constrain


def resolve_dtype(name: str) -> Any:
    """The dtype of matrix products; "auto" is bfloat16 on TPUs and GPUs and float32 on the CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16"):
        raise InputError(f"compute_dtype {name!r} is unknown; choose auto, float32 or bfloat16")
    return jnp.dtype(name)


def uniform_fan_in(fan_in: int) -> Callable:
    """Initialiser: uniform in +-1/sqrt(fan_in), PyTorch's default for weights and biases alike."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Conv(nn.Module):
    """Convolution, [B,H,W,C] -> [B,H',W',features]; `padding` is ((top, bottom), (left, right))."""

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple = ((1, 1), (1, 1))
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = uniform_fan_in(math.prod(shape[:-1]))
        init = nn.initializers.zeros if self.zero_init else init
        names = (None, None, "in_channels", "out_channels")
        kernel = self.param("kernel", nn.with_partitioning(init, names), shape)
        bias = self.param("bias", nn.with_partitioning(init, ("out_channels",)), (self.features,))
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias.astype(self.dtype).reshape(1, 1, 1, -1)


def downsample(features: int, *, symmetric: bool, dtype: Any, name: str) -> Conv:
    """3x3 stride-2 convolution; autoencoders pad right and bottom only, U-Nets all around."""
    padding = ((1, 1), (1, 1)) if symmetric else ((0, 1), (0, 1))
    return Conv(features, stride=2, padding=padding, dtype=dtype, name=name)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,2H,2W,C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Dense(nn.Module):
    """Linear map of the last axis; `names` are the logical axes of its kernel."""

    features: int
    names: tuple = ("in_channels", "out_channels")
    use_bias: bool = True
    zero_init: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.zero_init else uniform_fan_in(x.shape[-1])
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_partitioning(init, self.names), shape)
        y = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.with_partitioning(init, self.names[1:]), (self.features,))
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class GroupNorm(nn.Module):
    """Group normalisation over [B,H,W,C]; statistics in f32, output in x's dtype."""

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, (None,)), (c,))
        bias = self.param("bias", nn.with_partitioning(nn.initializers.zeros, (None,)), (c,))
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, c // self.groups)
        mean = y.mean((1, 3), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale.reshape(1, 1, 1, c) + bias.reshape(1, 1, 1, c)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis; statistics in f32, output in x's dtype."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, (None,)), (c,))
        bias = self.param("bias", nn.with_partitioning(nn.initializers.zeros, (None,)), (c,))
        y = x.astype(jnp.float32)
        mean = y.mean(-1, keepdims=True)
        variance = jnp.square(y - mean).mean(-1, keepdims=True)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        last = (1,) * (x.ndim - 1) + (c,)
        return (y * scale.reshape(last) + bias.reshape(last)).astype(x.dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, [B,T,N,K] x [B,T',N,K] -> [B,T,N,K]; scale 1/sqrt(K), softmax in f32."""
    q, k, v = (constrain(a, "batch", "tokens", "heads", None) for a in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v)


def parameter_axes(boxed: Any) -> Any:
    """Tuples of logical axis names, one per parameter, from a Linen tree of boxed shapes."""
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def check_groups(widths: list[int], groups: int, what: str) -> None:
    """Raises ValueError unless every width divides into the normalisation groups."""
    bad = sorted({w for w in widths if w % groups})
    if bad:
        raise InputError(
            f"{what}: width(s) {bad} must divide by norm_groups {groups}; change `width`, "
            "`width_multipliers` or `norm_groups`"
        )
