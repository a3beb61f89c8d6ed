"""From a first stage's moments to what a denoiser is trained on, and back: codecs by name.

Moments are [B,h,w,2C], mean and log-variance, of a Gaussian posterior, and the latent itself,
[B,h,w,C], of a point (VQ models, the identity).
"""

import dataclasses

import jax
import jax.numpy as jnp

from ldm_jax.errors import InputError, choose
from ldm_jax.keys import normal_like


def split_moments(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., 2C] -> mean and log-variance [..., C]; the log-variance is clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


def sample(moments: jax.Array, keys: jax.Array) -> jax.Array:
    """A posterior draw z [B,h,w,C] from moments [B,h,w,2C]; row i uses keys[i]."""
    mean, logvar = split_moments(moments)
    return mean + jnp.exp(0.5 * logvar) * normal_like(keys, mean)


def kl_to_standard_normal(moments: jax.Array) -> jax.Array:
    """KL(q || N(0, I)) per example [B], in nats, *summed* over the latent as published."""
    mean, logvar = split_moments(moments)
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class Whitening:
    """z_white = (z - shift) / scale, per channel; tuples of length C, so that it can be saved."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def whiten(self, z: jax.Array) -> jax.Array:
        """[..., C] latents of the autoencoder -> [..., C] latents of the denoiser."""
        shift, scale = (_last_axis(v, z) for v in (self.shift, self.scale))
        return (z - shift) / scale

    def unwhiten(self, z: jax.Array) -> jax.Array:
        """The inverse of `whiten`."""
        shift, scale = (_last_axis(v, z) for v in (self.shift, self.scale))
        return z * scale + shift


def _last_axis(values, z):
    return jnp.asarray(values, jnp.float32).reshape((1,) * (z.ndim - 1) + (-1,))


def whitening(
    kind: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    global_std: float,
    scale_factor: tuple[float, ...] = (),
    shift_factor: tuple[float, ...] = (),
) -> Whitening:
    """The whitening that a config names, from the statistics of a latent cache.

    `global`: divide by one number, as LDM does (scale_factor 1/std); `channel`: subtract the mean
    and divide by the deviation of each channel; `none`: latents as they are (LDM's VQ models);
    `fixed`: (z - shift_factor) * scale_factor, one number of each or one a channel, as published
    with a model (0.18215 for Stable Diffusion's). Raises InputError for what gives no scale.
    """
    count = len(mean)
    if len(std) != count or not all(0 < s < float("inf") for s in (*std, global_std)):
        raise InputError(
            f"latent statistics std {std} and {global_std} must be {count} positive finite numbers "
            "and one more; write the latent cache anew"
        )
    if kind != "fixed" and (scale_factor or shift_factor):
        raise InputError(
            f"scale_factor {scale_factor} and shift_factor {shift_factor} belong to the whitening "
            f"'fixed', not {kind!r}; leave them out or set --config.whitening=fixed"
        )
    if kind == "fixed":
        return _fixed(count, scale_factor, shift_factor)
    kinds = {
        "global": Whitening((0.0,) * count, (global_std,) * count),
        "channel": Whitening(tuple(mean), tuple(std)),
        "none": Whitening((0.0,) * count, (1.0,) * count),
    }
    choose("whitening", kind, sorted([*kinds, "fixed"]))
    return kinds[kind]


def _fixed(count: int, scale_factor: tuple[float, ...], shift_factor: tuple[float, ...]):
    bad = len(scale_factor) not in (1, count) or len(shift_factor) not in (0, 1, count)
    if bad or not all(0 < s < float("inf") for s in scale_factor):
        raise InputError(
            f"whitening 'fixed' needs a scale_factor of one or {count} positive numbers and a "
            f"shift_factor of none, one or {count}, not {scale_factor} and {shift_factor}; "
            "Stable Diffusion's is --config.scale_factor=(0.18215,)"
        )
    shift_factor = shift_factor or (0.0,)
    scale = scale_factor * (count if len(scale_factor) == 1 else 1)
    shift = shift_factor * (count if len(shift_factor) == 1 else 1)
    return Whitening(tuple(shift), tuple(1 / s for s in scale))


@dataclasses.dataclass(frozen=True)
class SampleCodec:
    """The denoiser sees draws of the posterior, or the point that a latent is, whitened.

    The methods are what every codec has; nothing else knows what the channels of z mean.
    """

    posterior: str  # "gaussian" | "point": what the moments are
    whitening: Whitening

    @property
    def channels(self) -> int:
        """Of z, the denoiser's latent."""
        return len(self.whitening.shift)

    def encode(self, moments: jax.Array, keys: jax.Array) -> jax.Array:
        """Moments [B,h,w,M] -> z [B,h,w,channels]; row i of a Gaussian is drawn with keys[i]."""
        gaussian = self.posterior == "gaussian"
        return self.whitening.whiten(sample(moments, keys) if gaussian else moments)

    def encode_mode(self, moments: jax.Array) -> jax.Array:
        """Moments [B,h,w,M] -> the most likely z [B,h,w,channels]; nothing is drawn."""
        gaussian = self.posterior == "gaussian"
        return self.whitening.whiten(split_moments(moments)[0] if gaussian else moments)

    def decode(self, z: jax.Array) -> jax.Array:
        """z [..., channels] -> the latent that the first stage decodes [..., C]."""
        return self.whitening.unwhiten(z)


CODECS: dict[str, type] = {"sample": SampleCodec}
POSTERIORS = ("gaussian", "point")


def make_codec(kind: str, posterior: str, whitening: Whitening) -> SampleCodec:
    """The codec of a name; raises InputError for an unknown one."""
    choose("codec", kind, CODECS)
    assert posterior in POSTERIORS, posterior
    return CODECS[kind](posterior, whitening)
