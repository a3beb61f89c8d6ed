"""Blocks that the autoencoder and the denoisers share: Linen modules that never leave models/.

Parameters are f32. Convolutions and matrix products run in `dtype`; statistics and softmax in f32.
Kernels and biases start as PyTorch's defaults do, uniform in +-1/sqrt(fan_in), because that is what
the published models were trained from.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError, choose
from ldm_jax.sharding import constrain, platform


def resolve_dtype(name: str) -> Any:
    """The dtype of matrix products; "auto" is bfloat16 on TPUs and GPUs and float32 on the CPU.

    The platform is that of the mesh in use, so that a program is the same wherever it is compiled.
    """
    choose("compute_dtype", name, ("auto", "float32", "bfloat16"))
    if name == "auto":
        name = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(name)


DRAW_SIZE = 2**26  # numbers in one draw of initial values: 256 MiB


class Declared(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter before it has a value: its logical axes, and the law it starts from.

    It starts as offset + scale * uniform(-1, 1), or as offset + scale * a standard normal.
    """

    value: Any
    names: tuple = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)
    offset: float = flax.struct.field(pytree_node=False)
    normal: bool = flax.struct.field(pytree_node=False, default=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        """Of parameters stacked by a scan over layers; the new axis is on every device whole."""
        return self.replace(names=(*self.names[:index], None, *self.names[index:]))

    def remove_axis(self, index, params):
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def declare(module: nn.Module, name: str, shape: tuple, names: tuple, *, scale=0.0, offset=0.0):
    """A parameter of a Linen module, f32; inside `init` only its declaration counts."""
    zeros = jnp.zeros(shape, jnp.float32)
    return module.param(name, lambda key: Declared(zeros, names, scale, offset))


def _is_declared(x: Any) -> bool:
    return isinstance(x, Declared)


def declarations(module: nn.Module, *inputs: Any) -> Any:
    """The tree of Declared parameters of a module, nothing computed."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]


def draw_parameters(declared: Any, key: jax.Array) -> Any:
    """Values for a tree of declarations: nested dicts of f32 arrays.

    Parameters are cut from a few long draws. Drawn one by one, the random number generator is
    compiled once for each, and starting a model takes longer than compiling its training step.
    """
    leaves, structure = jax.tree.flatten(declared, is_leaf=_is_declared)
    values = [jnp.full(leaf.value.shape, leaf.offset, jnp.float32) for leaf in leaves]
    chunks: list[list[int]] = [[]]
    for i, leaf in enumerate(leaves):
        if leaf.scale:
            if sum(leaves[j].value.size for j in chunks[-1]) + leaf.value.size > DRAW_SIZE:
                chunks.append([])
            chunks[-1].append(i)
    for number, members in enumerate(filter(None, chunks)):
        stops = np.cumsum([leaves[i].value.size for i in members])
        chunk_key = jax.random.fold_in(key, number)
        draws = jax.random.uniform(chunk_key, (int(stops[-1]),), jnp.float32, -1.0, 1.0)
        draws = constrain(draws, None)
        for i, draw in zip(members, jnp.split(draws, stops[:-1]), strict=True):
            if leaves[i].normal:  # by inversion, so that one draw serves both laws
                draw = math.sqrt(2) * jax.lax.erf_inv(draw)
            values[i] = values[i] + leaves[i].scale * draw.reshape(leaves[i].value.shape)
    return jax.tree.unflatten(structure, values)


def parameter_axes(declared: Any) -> Any:
    """Tuples of logical axis names, one for each declared parameter."""
    return jax.tree.map(lambda leaf: leaf.names, declared, is_leaf=_is_declared)


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
        scale = 0.0 if self.zero_init else 1 / math.sqrt(math.prod(shape[:-1]))
        names = (None, None, "in_channels", "out_channels")
        kernel = declare(self, "kernel", shape, names, scale=scale)
        bias = declare(self, "bias", shape[-1:], names[-1:], scale=scale)
        # Shards over fsdp are gathered here, in the type of the product: left to themselves,
        # partitioners shard the contraction (and XLA 0.10's CPU gradients are then wrong).
        kernel = constrain(kernel.astype(self.dtype), None, None, None, "out_channels")
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
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
        scale = 0.0 if self.zero_init else 1 / math.sqrt(x.shape[-1])
        kernel = declare(self, "kernel", (x.shape[-1], self.features), self.names, scale=scale)
        gathered = (None if name == "in_channels" else name for name in self.names)
        y = x.astype(self.dtype) @ constrain(kernel.astype(self.dtype), *gathered)
        if not self.use_bias:
            return y
        bias = declare(self, "bias", (self.features,), self.names[1:], scale=scale)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class GroupNorm(nn.Module):
    """Group normalisation over [B,H,W,C]; statistics in f32, output in x's dtype."""

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = declare(self, "scale", (c,), (None,), offset=1.0)
        bias = declare(self, "bias", (c,), (None,))
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
        scale = declare(self, "scale", (c,), (None,), offset=1.0)
        bias = declare(self, "bias", (c,), (None,))
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


def check_groups(widths: list[int], groups: int, what: str) -> None:
    """Raises InputError unless every width is positive and divides into the norm's groups."""
    if groups < 1:
        raise InputError(f"{what}: norm_groups {groups} must be at least 1")
    bad = sorted({w for w in widths if w % groups or w < 1})
    if bad:
        raise InputError(
            f"{what}: width(s) {bad} must divide by norm_groups {groups}; change `width`, "
            "`width_multipliers` or `norm_groups`"
        )
