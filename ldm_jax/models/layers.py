"""Blocks that the autoencoder and the denoisers share: Linen modules that never leave models/.

Parameters are f32. Convolutions and matrix products run in `dtype`; statistics and softmax in f32.
Kernels and biases start as PyTorch's defaults do, uniform in +-1/sqrt(fan_in), because that is what
the published models were trained from.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import InputError, choose
from ldm_jax.sharding import constrain, platform

COMPUTE_DTYPES = ("auto", "float32", "bfloat16")


def resolve_dtype(name: str) -> Any:
    """The dtype of matrix products; "auto" is bfloat16 on TPUs and GPUs and float32 on the CPU.

    The platform is that of the mesh in use, so that a program is the same wherever it is compiled.
    """
    choose("compute_dtype", name, COMPUTE_DTYPES)
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


def conv1x1(features: int, dtype: Any, name: str) -> Conv:
    return Conv(features, 1, padding=((0, 0), (0, 0)), dtype=dtype, name=name)


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
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = rows @ constrain(kernel.astype(self.dtype), *gathered)
        # One matrix: a kernel's gradient over several axes is copied about before its product.
        y = y.reshape(*x.shape[:-1], self.features)
        if not self.use_bias:
            return y
        bias = declare(self, "bias", (self.features,), self.names[1:], scale=scale)
        return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _spatial_sum(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,1,1,C]."""
    return x.sum((1, 2), keepdims=True)


def _group_mean(sums: jax.Array, shape: tuple[int, ...], groups: int) -> jax.Array:
    """Sums per channel [B,1,1,C] over a `shape` [B,H,W,C] -> means of their groups [B,1,1,C]."""
    b, h, w, c = shape
    means = sums.reshape(b, groups, c // groups).sum(-1, keepdims=True) / (h * w * (c // groups))
    return jnp.broadcast_to(means, (b, groups, c // groups)).reshape(b, 1, 1, c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, epsilon: float
) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, statistics over each group of channels.

    x [B,H,W,C], scale and bias f32 [C] -> like x; in between everything is f32. Statistics are put
    together from sums per channel, and the gradient is in closed form from two such sums: autodiff
    of the formula goes over the activations several times more. Reverse mode only, of any order.
    """
    return _group_norm_forward(x, scale, bias, groups, epsilon)[0]


def _group_norm_forward(x, scale, bias, groups, epsilon):
    y = x.astype(jnp.float32)
    mean = _group_mean(_spatial_sum(y), x.shape, groups)
    # About the mean, not E[y^2] - mean^2, which loses the digits of a small deviation.
    variance = _group_mean(_spatial_sum(jnp.square(y - mean)), x.shape, groups)
    r = jax.lax.rsqrt(variance + epsilon)
    gain = r * scale.reshape(1, 1, 1, -1)
    y = y * gain + (bias.reshape(1, 1, 1, -1) - mean * gain)
    return y.astype(x.dtype), (x, scale, mean, r)


def _group_norm_backward(groups, epsilon, residuals, dy):
    """With u = (x - mean) r, g = scale dy, <> the mean of a group: dx = r (g - <g> - u <g u>)."""
    x, scale, mean, r = residuals
    y, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    gain = r * scale.reshape(1, 1, 1, -1)
    sums = _spatial_sum(dy)
    products = _spatial_sum(dy * y) - mean * sums  # dy (x - mean), which is nowhere stored
    shift = _group_mean(sums * gain, x.shape, groups)
    slope = _group_mean(products * gain, x.shape, groups) * jnp.square(r)
    dx = dy * gain - y * slope + (mean * slope - shift)
    return dx.astype(x.dtype), (products * r).sum((0, 1, 2)), sums.sum((0, 1, 2))


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class GroupNorm(nn.Module):
    """Group normalisation over [B,H,W,C]; statistics in f32, output in x's dtype."""

    groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        scale = declare(self, "scale", (c,), (None,), offset=1.0)
        bias = declare(self, "bias", (c,), (None,))
        return group_norm(x, scale, bias, self.groups, self.epsilon)


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
