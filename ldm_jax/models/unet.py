"""The U-Net denoiser of Rombach et al. (CVPR 2022), a modified ADM (Dhariwal & Nichol, 2021).

With a context (class, text, layout) every attention is a spatial transformer with cross-attention;
without one it is ADM's multi-head attention block. Group norm has epsilon 1e-5 in residual blocks
and ADM attention, 1e-6 in spatial transformers.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError, choose, within
from ldm_jax.models.conditions import Signals, Widths
from ldm_jax.models.layers import (
    COMPUTE_DTYPES,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    attend,
    check_groups,
    conv1x1,
    declarations,
    downsample,
    draw_parameters,
    parameter_axes,
    resolve_dtype,
    upsample_nearest,
)
from ldm_jax.sharding import constrain

EDGES = ("conv_in", "conv_out", "time_in")  # first and last layers, for the optimizer


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Exactly one of num_heads and head_channels is positive; the other is 0."""

    in_channels: int = 0  # of the latents; 0 = theirs, as a run fills in
    out_channels: int = 0  # of the prediction; 0 = what the objective asks for
    width: int = 192  # channels at the finest level
    width_multipliers: tuple[int, ...] = (1, 2, 3, 5)
    num_res_blocks: int = 2  # per level going down; going up there is one more
    attention_factors: tuple[int, ...] = (8, 4, 2)  # downsampling factors at which levels attend
    num_heads: int = 1  # heads of width C / num_heads at every level
    head_channels: int = 0  # C / head_channels heads of this width
    transformer_depth: int = 1
    scale_shift_norm: bool = False  # time scales and shifts the norm instead of being added
    resample_in_blocks: bool = False  # residual blocks resample, instead of convolutions
    norm_groups: int = 32
    compute_dtype: str = "auto"  # bfloat16 on accelerators, float32 on the CPU

    def __post_init__(self):
        for name in ("in_channels", "out_channels"):
            within(f"unet {name}", getattr(self, name), "[0, inf)", "0 = what the latents ask for")
        for name in ("num_res_blocks", "transformer_depth"):
            within(f"unet {name}", getattr(self, name), "[1, inf)")
        choose("unet compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        within("unet width", self.width, "[2, inf)", "times take a cosine and a sine at least")
        if not self.width_multipliers:
            raise InputError("unet width_multipliers () are of no level; give one a level")
        odd = [f for f in self.attention_factors if f < 1 or f & (f - 1)]
        if odd:
            raise InputError(
                f"unet attention_factors {odd} are no level's; levels are downsampled by 1, 2, 4, "
                "8 and so on"
            )
        widths = [self.width * m for m in self.width_multipliers]
        check_groups(widths, self.norm_groups, "unet")
        few, many = sorted((self.num_heads, self.head_channels))
        if few != 0 or many < 1:
            raise InputError(
                f"unet num_heads {self.num_heads} and head_channels {self.head_channels}: exactly "
                "one must be positive, the other 0"
            )
        attending = {w for i, w in enumerate(widths) if 2**i in self.attention_factors} | {
            widths[-1]
        }
        bad = sorted(w for w in attending if w % (self.num_heads or self.head_channels))
        if bad:
            raise InputError(
                f"unet: attending width(s) {bad} must divide by "
                f"{'num_heads' if self.num_heads else 'head_channels'} "
                f"{self.num_heads or self.head_channels}"
            )

    def heads(self, channels: int) -> int:
        return self.num_heads or channels // self.head_channels

    @property
    def factor(self) -> int:
        """What the sides of z_t must divide by."""
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def dtype(self) -> Any:
        return resolve_dtype(self.compute_dtype)


def time_embedding(t: jax.Array, width: int) -> jax.Array:
    """Times [B] -> sinusoids f32 [B,width]: cosines first, frequencies 10000^(-i/half)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) / half * jnp.arange(half, dtype=jnp.float32))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _average_pool(x):
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


class _ResBlock(nn.Module):
    features: int
    config: UNetConfig
    resample: str = "none"  # "none" | "down" | "up"

    @nn.compact
    def __call__(self, x, embedding):
        c, dtype = self.config, self.config.dtype
        resample = {"none": lambda y: y, "down": _average_pool, "up": upsample_nearest}[
            self.resample
        ]
        h = resample(nn.swish(GroupNorm(c.norm_groups, 1e-5, name="norm1")(x)))
        x = resample(x)
        h = Conv(self.features, dtype=dtype, name="conv1")(h)
        out = self.features * (2 if c.scale_shift_norm else 1)
        e = Dense(out, dtype=dtype, name="time")(nn.swish(embedding))[:, None, None]  # [B,1,1,·]
        norm = GroupNorm(c.norm_groups, 1e-5, name="norm2")
        if c.scale_shift_norm:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + e)
        h = Conv(self.features, zero_init=True, dtype=dtype, name="conv2")(nn.swish(h))
        if x.shape[-1] != self.features:
            x = conv1x1(self.features, dtype, "shortcut")(x)
        return constrain(x + h, "batch", "height", "width", "channels")


class _SelfAttention(nn.Module):
    """ADM's attention block: heads are split before q, k and v."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x, context):
        b, h, w, c = x.shape
        heads, dtype = self.config.heads(c), self.config.dtype
        y = GroupNorm(self.config.norm_groups, 1e-5, name="norm")(x).reshape(b, h * w, c)
        qkv = Dense(3 * c, ("in_channels", "heads"), dtype=dtype, name="qkv")(y)
        q, k, v = jnp.split(qkv.reshape(b, h * w, heads, -1), 3, axis=-1)  # [B,T,N,K] each
        y = attend(q, k, v).reshape(b, h * w, c)
        y = Dense(c, ("heads", "in_channels"), zero_init=True, dtype=dtype, name="out")(y)
        return x + y.reshape(b, h, w, c)


class _CrossAttention(nn.Module):
    config: UNetConfig

    @nn.compact
    def __call__(self, x, context):
        (b, t, c), heads = x.shape, self.config.heads(x.shape[-1])

        def dense(name, y):
            names = ("in_channels", "heads")
            return Dense(c, names, use_bias=False, dtype=self.config.dtype, name=name)(y)

        q, k, v = dense("q", x), dense("k", context), dense("v", context)
        y = attend(*(a.reshape(b, -1, heads, c // heads) for a in (q, k, v))).reshape(b, t, c)
        return Dense(c, ("heads", "in_channels"), dtype=self.config.dtype, name="out")(y)


class _FeedForward(nn.Module):
    """GEGLU of inner width 4D."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x):
        width, dtype = x.shape[-1], self.config.dtype
        h = Dense(8 * width, ("in_channels", "hidden"), dtype=dtype, name="in")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        h = value * nn.gelu(gate, approximate=False)
        return Dense(width, ("hidden", "in_channels"), dtype=dtype, name="out")(h)


class _SpatialTransformer(nn.Module):
    config: UNetConfig

    @nn.compact
    def __call__(self, x, context):
        b, h, w, c = x.shape
        dtype = self.config.dtype
        y = GroupNorm(self.config.norm_groups, 1e-6, name="norm")(x).reshape(b, h * w, c)
        y = Dense(c, dtype=dtype, name="in")(y)
        for i in range(self.config.transformer_depth):
            z = LayerNorm(name=f"block{i}_norm1")(y)
            y = y + _CrossAttention(self.config, name=f"block{i}_self")(z, z)
            z = LayerNorm(name=f"block{i}_norm2")(y)
            y = y + _CrossAttention(self.config, name=f"block{i}_cross")(z, context)
            z = LayerNorm(name=f"block{i}_norm3")(y)
            y = y + _FeedForward(self.config, name=f"block{i}_feed_forward")(z)
            y = constrain(y, "batch", "tokens", "channels")
        y = Dense(c, zero_init=True, dtype=dtype, name="out")(y)
        return x + y.reshape(b, h, w, c)


class _UNet(nn.Module):
    config: UNetConfig

    @nn.compact
    def __call__(self, z_t, t, signals):
        c, dtype, last = self.config, self.config.dtype, len(self.config.width_multipliers) - 1
        context = signals.tokens
        attention = _SelfAttention if context is None else _SpatialTransformer
        e = time_embedding(t, c.width)
        e = Dense(4 * c.width, dtype=dtype, name="time_in")(e)
        e = Dense(4 * c.width, dtype=dtype, name="time_out")(nn.swish(e))
        if signals.vector is not None:
            e = e + signals.vector.astype(e.dtype)
        e = constrain(e, "batch", "channels")

        if signals.maps is not None:
            z_t = jnp.concatenate([z_t, signals.maps], axis=-1)
        x = Conv(c.width, dtype=dtype, name="conv_in")(z_t)
        skips = [x]
        for i, multiplier in enumerate(c.width_multipliers):
            for j in range(c.num_res_blocks):
                x = _ResBlock(c.width * multiplier, c, name=f"down{i}_block{j}")(x, e)
                if 2**i in c.attention_factors:
                    x = attention(c, name=f"down{i}_attention{j}")(x, context)
                skips.append(x)
            if i != last:
                name = f"down{i}_downsample"
                if c.resample_in_blocks:
                    x = _ResBlock(x.shape[-1], c, "down", name=name)(x, e)
                else:
                    x = downsample(x.shape[-1], symmetric=True, dtype=dtype, name=name)(x)
                skips.append(x)

        x = _ResBlock(x.shape[-1], c, name="mid_block1")(x, e)
        x = attention(c, name="mid_attention")(x, context)
        x = _ResBlock(x.shape[-1], c, name="mid_block2")(x, e)

        for i, multiplier in reversed(list(enumerate(c.width_multipliers))):
            for j in range(c.num_res_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = _ResBlock(c.width * multiplier, c, name=f"up{i}_block{j}")(x, e)
                if 2**i in c.attention_factors:
                    x = attention(c, name=f"up{i}_attention{j}")(x, context)
            if i:
                name = f"up{i}_upsample"
                if c.resample_in_blocks:
                    x = _ResBlock(x.shape[-1], c, "up", name=name)(x, e)
                else:
                    x = Conv(x.shape[-1], dtype=dtype, name=name)(upsample_nearest(x))

        x = nn.swish(GroupNorm(c.norm_groups, 1e-5, name="norm_out")(x))
        x = Conv(c.out_channels, zero_init=True, dtype=dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


@functools.cache
def _declared(config: UNetConfig, widths: Widths) -> Any:
    if widths.vector not in (0, 4 * config.width):
        raise InputError(
            f"unet: vectors of width {widths.vector} are added to the embedding of the time, whose "
            f"width is 4 x {config.width}; give conditions vectors of {4 * config.width}"
        )
    assert config.in_channels and config.out_channels, "unet: a run fills in channels of 0 first"
    z = jnp.zeros((1, config.factor, config.factor, config.in_channels))
    signals = Signals(
        jnp.zeros((1, widths.vector)) if widths.vector else None,
        jnp.zeros((1, 1, widths.tokens)) if widths.tokens else None,
        jnp.zeros((*z.shape[:3], widths.maps)) if widths.maps else None,
    )
    return declarations(_UNet(config), z, jnp.zeros((1,)), signals)


def init(config: UNetConfig, key: jax.Array, widths: Widths = Widths()) -> Any:
    """Parameters as nested dicts of f32 arrays; without tokens it is the unconditional model."""
    return draw_parameters(_declared(config, widths), key)


def axes(config: UNetConfig, widths: Widths = Widths()) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return parameter_axes(_declared(config, widths))


def apply(
    config: UNetConfig, params: Any, z_t: jax.Array, t: jax.Array, signals: Signals = Signals()
) -> jax.Array:
    """Noisy latents f32 [B,H,W,C], times [B], signals -> prediction f32 [B,H,W,C].

    H and W must divide by 2 ** (levels - 1); maps are of z_t's height and width.
    """
    if z_t.shape[1] % config.factor or z_t.shape[2] % config.factor:
        raise InputError(f"unet: latent side {z_t.shape[1:3]} must divide by {config.factor}")
    z_t = constrain(z_t, "batch", "height", "width", "channels")
    return _UNet(config).apply({"params": params}, z_t, t, signals)
