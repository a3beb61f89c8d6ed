"""From a first stage's moments to what a denoiser is trained on, and back: codecs by name.

Moments are [B,h,w,2C], mean and log-variance, of a Gaussian posterior, and the latent itself,
[B,h,w,C], of a point (VQ models, the identity).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

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
    # Of a second half, [C] in its own units: what a spread is kept within; empty without one.
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def beside(self, second: "Whitening") -> "Whitening":
        """Of both halves of a latent: this one's channels, then those of a `standardisation`."""
        shift, scale = self.shift + second.shift, self.scale + second.scale
        return Whitening(shift, scale, second.low, second.high)

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


def standardisation(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    global_std: float,
    low: tuple[float, ...],
    high: tuple[float, ...],
) -> Whitening:
    """Of a second half, from its statistics [C]: each channel to mean 0 and deviation 1.

    A channel that hardly varies is divided by 5 % of the half's whole deviation: else its noise
    would be blown up. Raises InputError for a half that is the same everywhere.
    """
    least = 0.05 * global_std
    if not 0 < least < float("inf"):
        raise InputError(
            f"the posterior's spread has a deviation of {global_std} over the latent cache, so a "
            "second half of the latent would tell nothing; use --config.codec=mean"
        )
    scale = tuple(max(s, least) for s in std)
    return Whitening(tuple(mean), scale, tuple(low), tuple(high))


class Codec(Protocol):
    """What every codec knows; nothing else knows what the channels of z mean."""

    @property
    def channels(self) -> int:
        """Of z, the denoiser's latent."""
        ...

    @property
    def halves(self) -> tuple[int, int]:
        """How many channels tell the first stage's latent, and how many its spread."""
        ...

    @property
    def draws(self) -> str:
        """Whether `encode` draws: anew at every "step", once for each "example", or "none"."""
        ...

    def encode(self, moments: jax.Array, keys: jax.Array) -> jax.Array:
        """Moments [B,h,w,M] -> z [B,h,w,channels]; row i, if it is drawn, with keys[i]."""
        ...

    def encode_mode(self, moments: jax.Array) -> jax.Array:
        """Moments [B,h,w,M] -> the most likely z [B,h,w,channels]; nothing is drawn."""
        ...

    def decode(self, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """z [..., channels] -> the latent that the first stage decodes [..., C].

        With keys [B] for z [B,h,w,channels] a draw of the posterior that z's second half tells.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PlainCodec:
    """z is a draw of the posterior, its mean, or the point that a latent is, whitened."""

    posterior: str  # "gaussian" | "point": what the moments are
    whitening: Whitening
    draws: str = "step"  # "step" | "example" | "none", which is the mean

    @property
    def channels(self) -> int:
        return len(self.whitening.shift)

    @property
    def halves(self) -> tuple[int, int]:
        return self.channels, 0

    def encode(self, moments: jax.Array, keys: jax.Array) -> jax.Array:
        if self.posterior == "point" or self.draws == "none":
            return self.encode_mode(moments)
        return self.whitening.whiten(sample(moments, keys))

    def encode_mode(self, moments: jax.Array) -> jax.Array:
        gaussian = self.posterior == "gaussian"
        return self.whitening.whiten(split_moments(moments)[0] if gaussian else moments)

    def decode(self, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        assert keys is None, "a latent of one half does not tell its spread"
        return self.whitening.unwhiten(z)


class Spread(NamedTuple):
    """A measure of a posterior's spread."""

    part: str  # of a cache's moments, by name
    of: Callable[[jax.Array], jax.Array]  # from the log-variance
    std: Callable[[jax.Array], jax.Array]  # to the standard deviation


@dataclasses.dataclass(frozen=True)
class ConcatCodec:
    """z is the posterior's mean beside its spread, each half whitened by statistics of its own."""

    spread: Spread
    whitening: Whitening  # of both halves
    draws = "none"

    @property
    def channels(self) -> int:
        return len(self.whitening.shift)

    @property
    def halves(self) -> tuple[int, int]:
        second = len(self.whitening.low)
        return self.channels - second, second

    def encode(self, moments: jax.Array, keys: jax.Array) -> jax.Array:
        return self.encode_mode(moments)

    def encode_mode(self, moments: jax.Array) -> jax.Array:
        mean, logvar = split_moments(moments)
        return self.whitening.whiten(jnp.concatenate([mean, self.spread.of(logvar)], -1))

    def decode(self, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        mean, spread = jnp.split(self.whitening.unwhiten(z), self.halves[:1], -1)
        if keys is None:
            return mean
        low, high = (_last_axis(v, z) for v in (self.whitening.low, self.whitening.high))
        return mean + self.spread.std(jnp.clip(spread, low, high)) * normal_like(keys, mean)


DRAWS = {"sample": "step", "sample_frozen": "example", "mean": "none"}
"""Codecs of one half: when each draws."""
SPREADS = {
    "mean_logvar": Spread("logvar", lambda logvar: logvar, lambda x: jnp.exp(0.5 * x)),
    "mean_std": Spread("std", lambda logvar: jnp.exp(0.5 * logvar), lambda x: x),
    "mean_var": Spread("var", jnp.exp, jnp.sqrt),
}
"""Codecs of two halves: what the second one is."""
CODECS = (*DRAWS, *SPREADS)
POSTERIORS = ("gaussian", "point")


def parts_of(kind: str, posterior: str) -> tuple[str, ...]:
    """The parts of the moments that a codec whitens by their own statistics: "mean" and a spread.

    Those of draws and of points are the cache's as it is. Raises InputError for an unknown name
    and for a spread that the posterior has not.
    """
    choose("codec", kind, CODECS)
    assert posterior in POSTERIORS, posterior
    if posterior == "point":
        if kind in SPREADS:
            raise InputError(
                f"codec {kind!r} holds the spread of a posterior, and this first stage's latents "
                "are points without one (VQ, identity); use --config.codec=mean"
            )
        return ()
    if kind in SPREADS:
        return ("mean", SPREADS[kind].part)
    return ("mean",) if DRAWS[kind] == "none" else ()


def make_codec(kind: str, posterior: str, whitening: Whitening) -> Codec:
    """The codec of a name; raises InputError as `parts_of` does."""
    parts_of(kind, posterior)
    if kind in SPREADS:
        return ConcatCodec(SPREADS[kind], whitening)
    return PlainCodec(posterior, whitening, DRAWS[kind])
