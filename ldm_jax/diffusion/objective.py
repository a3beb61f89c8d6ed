"""What a denoiser is trained on: the target, the weight of each noise level, and the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ldm_jax.diffusion import learned_variance, noise_levels, parameterisation
from ldm_jax.diffusion.noise_levels import NoiseLevels
from ldm_jax.diffusion.process import (
    Denoiser,
    Process,
    TableProcess,
    corrupt,
    example_means,
    over_channels,
)
from ldm_jax.errors import InputError, choose, within

LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"l1": jnp.abs, "l2": jnp.square}
"""Elementwise penalty of the error, prediction - target."""


@dataclass(frozen=True)
class Objective:
    parameterisation: str = "eps"  # "eps" | "x0" | "v" | "velocity" | "preconditioned" (EDM's F)
    weight: str = "simple"  # a name in WEIGHTS
    min_snr_gamma: float = 5.0  # of weight min_snr
    offset_noise: float = 0.0  # std of a draw per example and channel, added to the noise; 0 = none
    cosine_weight: float = 0.0  # of 1 - cos(prediction, target) along the channels; 0 = none
    learned_variance: bool = False  # also of 2C channels: ddpm's variances, by the hybrid loss
    uncertainty: int = 0  # features of a u(t) learned beside, loss / e^u + u; 0 = none; EDM2: 128
    noise_levels: NoiseLevels = NoiseLevels()

    def __post_init__(self):
        choose("parameterisation", self.parameterisation, parameterisation.PARAMETERISATIONS)
        choose("weight", self.weight, WEIGHTS)
        within("min_snr_gamma", self.min_snr_gamma, "(0, inf)", "5 is published")
        within("uncertainty", self.uncertainty, "[0, inf)", "0 = none")
        within("offset_noise", self.offset_noise, "[0, inf)", "0 = none")
        within("cosine_weight", self.cosine_weight, "[0, inf)", "0 = none")


def check(process: Process, objective: Objective) -> None:
    """Raises InputError where the objective does not fit the process.

    For whoever puts the two together: the functions below take it as done.
    """
    parameterisation.check(process, objective.parameterisation)
    noise_levels.check(process, objective.noise_levels)
    name, kind = objective.parameterisation, process.config.kind
    if objective.learned_variance and (name != "eps" or process.num_timesteps < 2):
        raise InputError(
            f"learned_variance is of parameterisation 'eps' at timesteps, not of {name!r} and "
            f"process kind {kind!r}; leave it out"
        )


def _min_snr(objective: Objective, std: float, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """sigma^2 min(SNR, gamma) (Hang et al. 2023)."""
    weight = jnp.minimum(alpha**2, objective.min_snr_gamma * sigma**2)
    # Pure noise would never be trained, and sampling begins there; theirs is 1 there too.
    return jnp.where(alpha == 0, sigma**2, weight)


def _snr_plus_one(
    objective: Objective, std: float, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """sigma^2 (SNR + 1) (Salimans and Ho 2022)."""
    return alpha**2 + sigma**2


def _edm(objective: Objective, std: float, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """sigma^2 / c_out^2: EDM table 1, for z_t / alpha."""
    return alpha**2 + (sigma / std) ** 2


OfX0 = Callable[[Objective, float, jax.Array, jax.Array], jax.Array]
"""(objective, sigma_data, alpha [B], sigma [B]) -> [B]."""

WEIGHTS: dict[str, OfX0 | None] = {
    "simple": None,  # 1 on the error of the prediction itself
    "min_snr": _min_snr,
    "snr_plus_one": _snr_plus_one,
    "edm": _edm,
}
"""sigma^2 times the weight of the squared error of x0."""


def weight(process: Process, objective: Objective, t: jax.Array) -> jax.Array:
    """The weight [B] of the prediction's error at times t [B].

    A weight of x0's error is one of the prediction's by (x0 error)^2 = (sigma / det)^2 error^2: it
    is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v, as published.
    """
    of_x0 = WEIGHTS[objective.weight]
    alpha, sigma = process.coefficients(t)
    if of_x0 is None:
        return jnp.ones_like(sigma)
    square = parameterisation.determinant(process, objective.parameterisation, t) ** 2
    return of_x0(objective, process.config.sigma_data, alpha, sigma) / jnp.maximum(square, 1e-20)


def offset(objective: Objective, keys: jax.Array, noise: jax.Array) -> jax.Array:
    """noise [B, H, W, C] plus offset_noise N(0, 1) per example and channel, from keys [B]."""
    if objective.offset_noise == 0:
        return noise
    draws = jax.vmap(lambda key: jax.random.normal(key, noise.shape[-1:]))(keys)
    between = (1,) * (noise.ndim - 2)
    return noise + objective.offset_noise * draws.reshape(len(draws), *between, -1)


def direction_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - cos of the channel vectors of two [B, ..., C], averaged to [B] (LightningDiT)."""
    norms = jnp.linalg.norm(prediction, axis=-1) * jnp.linalg.norm(target, axis=-1)
    cos = jnp.sum(prediction * target, axis=-1) / jnp.maximum(norms, 1e-8)
    return jnp.mean(1 - cos, axis=tuple(range(1, cos.ndim)))


class Denoised(NamedTuple):
    """What `denoising_loss` makes of a batch."""

    loss: jax.Array  # [B] f32
    x0: jax.Array  # [B, H, W, C] f32, the prediction's estimate of the data


def denoising_loss(
    denoiser: Denoiser,
    process: Process,
    objective: Objective,
    *,
    z0: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    cond: Any,
    penalty: str = "l2",
    uncertainty: Callable[[jax.Array], jax.Array] | None = None,
    channel_weights: ArrayLike | None = None,
) -> Denoised:
    """The loss of predicting the target in z0 [B, H, W, C] at native times t [B], 0 = data.

    Averaged over H, W and C (DDPM eq. 14, LDM eq. 2), times the weight. `cond` has leading axis B.
    `uncertainty` t [B] -> u [B] makes it loss / e^u + u (EDM2). `channel_weights` [C] make the
    mean, the direction's products and the bound's mean weighted ones. With `learned_variance` the
    prediction has 2C channels, and the bound's term is added. The objective is one that `check`
    lets pass; raises InputError for a penalty that is not in LOSSES.
    """
    choose("loss", penalty, LOSSES)
    z_t = corrupt(process, z0, noise, t)
    output = denoiser(z_t, t, cond)
    prediction, v = learned_variance.split(output) if objective.learned_variance else (output, None)
    # A prediction of [B, H, W, 1] would broadcast to a plausible number.
    assert prediction.shape == noise.shape, (
        f"prediction {output.shape} must have z0's shape {noise.shape}, its channels twice with "
        "learned_variance"
    )
    prediction, name = _f32(prediction), objective.parameterisation
    target = _f32(parameterisation.target(process, name, z0, noise, t))
    errors = LOSSES[penalty](prediction - target)
    loss = example_means(errors, channel_weights)
    if objective.weight != "simple":
        loss = loss * weight(process, objective, t)
    if uncertainty is not None:
        loss = loss * jnp.exp(-uncertainty(t)) + uncertainty(t)
    if objective.cosine_weight:
        vectors = prediction, target
        if channel_weights is not None:
            vectors = [x * jnp.sqrt(over_channels(channel_weights, x)) for x in vectors]
        loss = loss + objective.cosine_weight * direction_error(*vectors)
    if v is not None:
        assert isinstance(process, TableProcess), "learned variances are of timesteps"
        data = _f32(z0), _f32(z_t)
        bound = learned_variance.hybrid_vlb(process, *data, prediction, _f32(v), t, channel_weights)
        loss = loss + learned_variance.hybrid_weight(process) * bound
    x0, _ = parameterisation.x0_and_eps(process, name, _f32(z_t), prediction, t)
    return Denoised(loss, x0)


def _f32(x: jax.Array) -> jax.Array:
    """x in f32, or f64 when it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
