"""The convolutional first stage: images to a latent, and back.

The latent is a diagonal Gaussian ("kl"), a point that decoding snaps to a codebook ("vq"), or the
image itself ("identity", for diffusion on pixels).

Encoder, decoder and 1x1 adapters as published (Rombach et al., CVPR 2022; the architecture is that
of Esser et al., CVPR 2021): no tanh, no clamp, attention always in the middle, group norm with
epsilon 1e-6, downsampling padded on the right and at the bottom only.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError, choose
from ldm_jax.models import latents, quantizer
from ldm_jax.models.layers import (
    COMPUTE_DTYPES,
    Conv,
    Declared,
    GroupNorm,
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
from ldm_jax.models.quantizer import QuantizerConfig
from ldm_jax.sharding import constrain

LATENTS = ("kl", "vq", "identity")
EDGES = ("conv_in", "conv_out", "adapter")  # first and last layers, for the optimizer


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """A first stage with downsampling factor 2 ** (len(width_multipliers) - 1)."""

    latent: str = "kl"  # "kl" Gaussian | "vq" codebook | "identity" the image, nothing learnt
    resolution: int = 256  # image side; only decides where attention sits
    image_channels: int = 3
    width: int = 128  # channels at full resolution
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = ()  # sides of the feature maps that attend
    middle_attention: bool = True  # False: attention-free, for decoding large images
    z_channels: int = 4  # at the bottleneck, before the 1x1 adapter
    latent_channels: int = 4  # C of the latent
    norm_groups: int = 32
    quantizer: QuantizerConfig = QuantizerConfig()  # read where latent is "vq"
    compute_dtype: str = "auto"  # bfloat16 on accelerators, float32 on the CPU

    def __post_init__(self):
        choose("latent", self.latent, LATENTS)
        choose("autoencoder compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        if self.latent == "identity":
            if (len(self.width_multipliers), self.latent_channels) != (1, self.image_channels):
                raise InputError(
                    f"an identity first stage has one level and the image's channels, not "
                    f"width_multipliers {self.width_multipliers} and latent_channels "
                    f"{self.latent_channels}; set them to (1,) and {self.image_channels}"
                )
            return
        sizes = {
            "width_multipliers": min(self.width_multipliers, default=0),
            "num_res_blocks": self.num_res_blocks,
            "z_channels": self.z_channels,
            "latent_channels": self.latent_channels,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(
                    f"autoencoder {name} {getattr(self, name)} must be at least 1, of one level or "
                    "more"
                )
        check_groups(
            [self.width * m for m in self.width_multipliers], self.norm_groups, "autoencoder"
        )
        if self.resolution % self.factor:
            raise InputError(
                f"autoencoder resolution {self.resolution} must divide by its downsampling factor "
                f"{self.factor} (width_multipliers {self.width_multipliers})"
            )
        unknown = sorted(set(self.attention_resolutions) - set(self.sides))
        if unknown:
            raise InputError(
                f"autoencoder attention_resolutions {unknown} are no level's side; those of "
                f"resolution {self.resolution} are {self.sides}"
            )

    @property
    def factor(self) -> int:
        return 2 ** (len(self.width_multipliers) - 1)

    @property
    def sides(self) -> list[int]:
        """Of the feature maps, level by level."""
        return [self.resolution // 2**i for i in range(len(self.width_multipliers))]

    @property
    def attends(self) -> list[bool]:
        """Which levels do."""
        return [side in self.attention_resolutions for side in self.sides]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // self.factor
        return (side, side, self.latent_channels)

    @property
    def moment_channels(self) -> int:
        """Channels that `encode` gives: 2C (mean, log-variance) of a Gaussian, C of a point."""
        return 2 * self.latent_channels if self.latent == "kl" else self.latent_channels

    @property
    def posterior(self) -> str:
        """What its moments are, as codecs call it."""
        return "gaussian" if self.latent == "kl" else "point"

    @property
    def dtype(self) -> Any:
        return resolve_dtype(self.compute_dtype)


class _ResBlock(nn.Module):
    features: int
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, self.config.dtype
        h = nn.swish(GroupNorm(c.norm_groups, name="norm1")(x))
        h = Conv(self.features, dtype=dtype, name="conv1")(h)
        h = nn.swish(GroupNorm(c.norm_groups, name="norm2")(h))
        h = Conv(self.features, dtype=dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = conv1x1(self.features, dtype, "shortcut")(x)
        return constrain(x + h, "batch", "height", "width", "channels")


class _Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        dtype = self.config.dtype
        y = GroupNorm(self.config.norm_groups, name="norm")(x)
        q, k, v = (conv1x1(c, dtype, name)(y).reshape(b, h * w, 1, c) for name in ("q", "k", "v"))
        y = attend(q, k, v).reshape(b, h, w, c)
        return x + conv1x1(c, dtype, "out")(y)


def _middle(x, config):
    x = _ResBlock(x.shape[-1], config, name="mid_block1")(x)
    if config.middle_attention:
        x = _Attention(config, name="mid_attention")(x)
    return _ResBlock(x.shape[-1], config, name="mid_block2")(x)


class _Encoder(nn.Module):
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        c, dtype, last = self.config, self.config.dtype, len(self.config.width_multipliers) - 1
        x = Conv(c.width, dtype=dtype, name="conv_in")(x)
        for i, multiplier in enumerate(c.width_multipliers):
            for j in range(c.num_res_blocks):
                x = _ResBlock(c.width * multiplier, c, name=f"level{i}_block{j}")(x)
                if c.attends[i]:
                    x = _Attention(c, name=f"level{i}_attention{j}")(x)
            if i != last:
                down = downsample(
                    x.shape[-1], symmetric=False, dtype=dtype, name=f"level{i}_downsample"
                )
                x = down(x)
        x = _middle(x, c)
        x = nn.swish(GroupNorm(c.norm_groups, name="norm_out")(x))
        z_channels = 2 * c.z_channels if c.latent == "kl" else c.z_channels
        x = Conv(z_channels, dtype=dtype, name="conv_out")(x)
        return conv1x1(c.moment_channels, dtype, "adapter")(x).astype(jnp.float32)


def _decoder_start(z, config):
    """Up to the middle; run inside a module, whose parameters it names."""
    x = conv1x1(config.z_channels, config.dtype, "adapter")(z)
    width = config.width * config.width_multipliers[-1]
    return _middle(Conv(width, dtype=config.dtype, name="conv_in")(x), config)


def _decoder_level(x, level, config):
    """One level's blocks and what enlarges their output; likewise."""
    for j in range(config.num_res_blocks + 1):
        features = config.width * config.width_multipliers[level]
        x = _ResBlock(features, config, name=f"level{level}_block{j}")(x)
        if config.attends[level]:
            x = _Attention(config, name=f"level{level}_attention{j}")(x)
    if level:
        x = upsample_nearest(x)
        x = Conv(x.shape[-1], dtype=config.dtype, name=f"level{level}_upsample")(x)
    return x


class _Decoder(nn.Module):
    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z):
        x = _decoder_start(z, self.config)
        for level in reversed(range(len(self.config.width_multipliers))):
            x = _decoder_level(x, level, self.config)
        return nn.swish(GroupNorm(self.config.norm_groups, name="norm_out")(x))


class _DecoderStart(nn.Module):
    """The first part of `_Decoder`, of its parameters."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, z):
        return _decoder_start(z, self.config)


class _DecoderLevel(nn.Module):
    """A level of `_Decoder`, of its parameters."""

    config: AutoencoderConfig
    level: int

    @nn.compact
    def __call__(self, x):
        return _decoder_level(x, self.level, self.config)


def _last_layer(config):
    return Conv(config.image_channels, dtype=config.dtype, name="conv_out")


@functools.cache
def _declared(config: AutoencoderConfig) -> Any:
    if config.latent == "identity":
        return {"encoder": {}, "decoder": {}}
    x = jnp.zeros((1, config.resolution, config.resolution, config.image_channels))
    z = jnp.zeros((1, *config.latent_shape))
    features = jnp.zeros((1, 1, 1, config.width * config.width_multipliers[0]))
    decoder = declarations(_Decoder(config), z)
    decoder["conv_out"] = declarations(_last_layer(config), features)
    declared = {"encoder": declarations(_Encoder(config), x), "decoder": decoder}
    if config.latent == "vq":
        n = config.quantizer.codebook_size
        codebook = jax.ShapeDtypeStruct((n, config.latent_channels), jnp.float32)
        declared["quantizer"] = {"codebook": Declared(codebook, quantizer.AXES, 1 / n, 0.0)}
    return declared


def init(config: AutoencoderConfig, key: jax.Array) -> Any:
    """Parameters as nested dicts of f32 arrays."""
    return draw_parameters(_declared(config), key)


def axes(config: AutoencoderConfig) -> Any:
    """The tree of `init` with a tuple of logical axis names for each parameter."""
    return parameter_axes(_declared(config))


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 images in 0..255 -> f32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: jax.Array) -> jax.Array:
    """f32 images in [-1, 1] -> uint8, rounded to the nearest value and clipped."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def encode(config: AutoencoderConfig, params: Any, x: jax.Array) -> jax.Array:
    """Images f32 [B,H,W,3] in [-1,1] -> moments f32 [B,H/f,W/f,2C]: mean, then log-variance.

    A latent that is no distribution ("vq", "identity") is given itself, [B,H/f,W/f,C]; that of a
    VQ model is not yet quantized, as published.
    """
    if config.latent == "identity":
        return x
    x = constrain(x, "batch", "height", "width", "channels")
    return _Encoder(config).apply({"params": params["encoder"]}, x)


def decode(config: AutoencoderConfig, params: Any, z: jax.Array) -> jax.Array:
    """Latents f32 [B,h,w,C], as the encoder gives them (unwhitened) -> images f32 [B,hf,wf,3].

    A VQ model snaps them to its codebook first.
    """
    if config.latent == "identity":
        return z
    if config.latent == "vq":
        z = quantizer.quantize(params["quantizer"]["codebook"], z)[0]
    return to_image(config, params, decode_features(config, params, z))


def decode_features(config: AutoencoderConfig, params: Any, z: jax.Array) -> jax.Array:
    """The decoder up to its last layer, [B,h,w,C] -> [B,hf,wf,width]; nothing is quantized."""
    z = constrain(z, "batch", "height", "width", "channels")
    return _Decoder(config).apply({"params": params["decoder"]}, z)


def decoder_taps(config: AutoencoderConfig) -> tuple[str, ...]:
    """Names of `decoder_maps`: "mid", then "up0", "up1", ... from the deepest level on."""
    if config.latent == "identity":
        return ()
    return ("mid", *(f"up{i}" for i in range(len(config.width_multipliers))))


def decoder_maps(
    config: AutoencoderConfig, params: Any, z: jax.Array, count: int, *, remat: bool = False
) -> list[jax.Array]:
    """The first `count` inner maps of decoding z [B,h,w,C], [B,H_l,W_l,C_l] in the compute dtype.

    In the order of `decoder_taps`: what leaves the middle, then what leaves each level, enlarged
    where it is; nothing after them is computed. A VQ model's z is snapped to its codebook, with the
    gradient of the identity. `remat` computes each level again for its gradient.
    """
    assert 1 <= count <= len(decoder_taps(config)), f"{count} of {decoder_taps(config)}"
    if config.latent == "vq":
        snapped = quantizer.quantize(params["quantizer"]["codebook"], z)[0]
        z = quantizer.straight_through(z, snapped)
    z = constrain(z, "batch", "height", "width", "channels")
    levels = range(len(config.width_multipliers))
    parts = [_DecoderStart(config), *(_DecoderLevel(config, i) for i in reversed(levels))]
    maps = [z]
    for part in parts[:count]:
        run = jax.checkpoint(part.apply) if remat else part.apply
        maps.append(run({"params": params["decoder"]}, maps[-1]))
    return maps[1:]


def to_image(config: AutoencoderConfig, params: Any, features: jax.Array) -> jax.Array:
    """The decoder's last layer, [B,H,W,width] -> f32 [B,H,W,3]."""
    last = {"params": params["decoder"]["conv_out"]}
    return _last_layer(config).apply(last, features).astype(jnp.float32)


def draw(config: AutoencoderConfig, moments: jax.Array, keys: jax.Array) -> jax.Array:
    """A latent z [B,h,w,C] from what `encode` gave; row i of a Gaussian is drawn with keys[i]."""
    return latents.sample(moments, keys) if config.latent == "kl" else moments


def mode(config: AutoencoderConfig, moments: jax.Array) -> jax.Array:
    """The latent's most likely value [B,h,w,C] from what `encode` gave."""
    return latents.split_moments(moments)[0] if config.latent == "kl" else moments
