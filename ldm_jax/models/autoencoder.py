"""The convolutional first stage: images to the moments of a diagonal Gaussian latent, and back.

Encoder, decoder and 1x1 adapters as published (Rombach et al., CVPR 2022; the architecture is that
of Esser et al., CVPR 2021): no tanh, no clamp, attention always in the middle, group norm with
epsilon 1e-6, downsampling padded on the right and at the bottom only.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError
from ldm_jax.models.layers import (
    Conv,
    GroupNorm,
    attend,
    check_groups,
    declarations,
    downsample,
    draw_parameters,
    parameter_axes,
    resolve_dtype,
    upsample_nearest,
)
from ldm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Config:
    """A first stage with downsampling factor 2 ** (len(width_multipliers) - 1)."""

    resolution: int = 256  # image side; only decides where attention sits
    image_channels: int = 3
    width: int = 128  # channels at full resolution
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = ()  # sides of the feature maps that attend
    z_channels: int = 4  # at the bottleneck, before the 1x1 adapter
    latent_channels: int = 4  # C of the latent
    norm_groups: int = 32
    compute_dtype: str = "auto"  # bfloat16 on accelerators, float32 on the CPU

    def __post_init__(self):
        check_groups(
            [self.width * m for m in self.width_multipliers], self.norm_groups, "autoencoder"
        )
        if self.resolution % self.factor:
            raise InputError(
                f"autoencoder resolution {self.resolution} must divide by its downsampling factor "
                f"{self.factor} (width_multipliers {self.width_multipliers})"
            )

    @property
    def factor(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.factor
        return (side, side, self.latent_channels)

    @property
    def dtype(self) -> Any:
        return resolve_dtype(self.compute_dtype)


class _ResBlock(nn.Module):
    features: int
    config: Config

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, self.config.dtype
        h = nn.swish(GroupNorm(c.norm_groups, name="norm1")(x))
        h = Conv(self.features, dtype=dtype, name="conv1")(h)
        h = nn.swish(GroupNorm(c.norm_groups, name="norm2")(h))
        h = Conv(self.features, dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, padding=((0, 0), (0, 0)), dtype=dtype, name="shortcut")(x)
        return constrain(x + h, "batch", "height", "width", "channels")


class _Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    config: Config

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        dtype = self.config.dtype
        y = GroupNorm(self.config.norm_groups, name="norm")(x)
        q, k, v = (_conv1x1(c, dtype, name)(y).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y = attend(q, k, v).reshape(b, h, w, c)
        return x + _conv1x1(c, dtype, "out")(y)


def _conv1x1(features, dtype, name):
    return Conv(features, 1, padding=((0, 0), (0, 0)), dtype=dtype, name=name)


def _middle(x, config):
    x = _ResBlock(x.shape[-1], config, name="mid_block1")(x)
    x = _Attention(config, name="mid_attention")(x)
    return _ResBlock(x.shape[-1], config, name="mid_block2")(x)


class _Encoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c, dtype, last = self.config, self.config.dtype, len(self.config.width_multipliers) - 1
        x = Conv(c.width, dtype=dtype, name="conv_in")(x)
        for i, multiplier in enumerate(c.width_multipliers):
            for j in range(c.num_res_blocks):
                x = _ResBlock(c.width * multiplier, c, name=f"level{i}_block{j}")(x)
                if c.resolution // 2**i in c.attention_resolutions:
                    x = _Attention(c, name=f"level{i}_attention{j}")(x)
            if i != last:
                down = downsample(
                    x.shape[-1], symmetric=False, dtype=dtype, name=f"level{i}_downsample"
                )
                x = down(x)
        x = _middle(x, c)
        x = nn.swish(GroupNorm(c.norm_groups, name="norm_out")(x))
        x = Conv(2 * c.z_channels, dtype=dtype, name="conv_out")(x)
        return _conv1x1(2 * c.latent_channels, dtype, "adapter")(x).astype(jnp.float32)


class _Decoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, z):
        c, dtype = self.config, self.config.dtype
        x = _conv1x1(c.z_channels, dtype, "adapter")(z)
        x = Conv(c.width * c.width_multipliers[-1], dtype=dtype, name="conv_in")(x)
        x = _middle(x, c)
        for i, multiplier in reversed(list(enumerate(c.width_multipliers))):
            for j in range(c.num_res_blocks + 1):
                x = _ResBlock(c.width * multiplier, c, name=f"level{i}_block{j}")(x)
                if c.resolution // 2**i in c.attention_resolutions:
                    x = _Attention(c, name=f"level{i}_attention{j}")(x)
            if i:
                x = upsample_nearest(x)
                x = Conv(x.shape[-1], dtype=dtype, name=f"level{i}_upsample")(x)
        x = nn.swish(GroupNorm(c.norm_groups, name="norm_out")(x))
        return Conv(c.image_channels, dtype=dtype, name="conv_out")(x).astype(jnp.float32)


def _declared(config: Config) -> Any:
    x = jnp.zeros((1, config.resolution, config.resolution, config.image_channels))
    z = jnp.zeros((1, *config.latent_shape))
    return {
        "encoder": declarations(_Encoder(config), x),
        "decoder": declarations(_Decoder(config), z),
    }


def init(config: Config, key: jax.Array) -> Any:
    """Parameters as nested dicts of f32 arrays."""
    return draw_parameters(_declared(config), key)


def axes(config: Config) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return parameter_axes(_declared(config))


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 images in 0..255 -> f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
    """f32 images in [-1, 1] -> uint8, rounded to the nearest value and clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def encode(config: Config, params: Any, x: jax.Array) -> jax.Array:
    """Images f32 [B,H,W,3] in [-1,1] -> moments f32 [B,H/f,W/f,2C]: mean, then log-variance."""
    x = constrain(x, "batch", "height", "width", "channels")
    return _Encoder(config).apply({"params": params["encoder"]}, x)


def decode(config: Config, params: Any, z: jax.Array) -> jax.Array:
    """Latents f32 [B,h,w,C], as the encoder gives them (unwhitened) -> images f32 [B,hf,wf,3]."""
    z = constrain(z, "batch", "height", "width", "channels")
    return _Decoder(config).apply({"params": params["decoder"]}, z)
