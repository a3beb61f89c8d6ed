"""What a denoiser is trained on: the target, the weight of each noise level, and the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import learned_variance, noise_levels, parameterisation
from ldm_jax.diffusion.noise_levels import NoiseLevels
from ldm_jax.diffusion.process import Denoiser, Process, coefficients, corrupt
from ldm_jax.errors import InputError

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
        names = parameterisation.PARAMETERISATIONS
        if self.parameterisation not in names:
            raise InputError(
                f"parameterisation {self.parameterisation!r} is unknown; choose one of "
                f"{list(names)}"
            )
        if self.weight not in WEIGHTS:
            raise InputError(f"weight {self.weight!r} is unknown; choose one of {list(WEIGHTS)}")
        if not 0 < self.min_snr_gamma < np.inf:
            raise InputError(f"min_snr_gamma {self.min_snr_gamma} must be positive; 5 is published")
        if self.uncertainty < 0:
            raise InputError(f"uncertainty {self.uncertainty} must not be negative; 0 = none")
        for name in ("offset_noise", "cosine_weight"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InputError(f"{name} {getattr(self, name)} must not be negative; 0 = none")


def check(process: Process, objective: Objective) -> None:
    """Raises InputError where the objective does not fit the process."""
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


WEIGHTS: dict[str, Callable[..., jax.Array] | None] = {
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
    alpha, sigma = coefficients(process, t)
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


def denoising_loss(
    denoiser: Denoiser,
    process: Process,
    z0: jax.Array,
    cond: Any,
    t: jax.Array,
    noise: jax.Array,
    loss: str = "l2",
    objective: Objective = Objective(),
    uncertainty: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The loss [B] f32 of predicting the target in z0 [B, H, W, C] at native times t [B], 0 = data.

    Averaged over H, W and C (DDPM eq. 14, LDM eq. 2), times the weight. `cond` has leading axis B.
    `uncertainty` t [B] -> u [B] makes it loss / e^u + u (EDM2). With `learned_variance` the
    prediction has 2C channels, and the bound's term is added. Raises InputError for a `loss` that
    is not in LOSSES, or an objective that does not fit the process.
    """
    if loss not in LOSSES:
        raise InputError(f"loss {loss!r} is unknown; choose one of {list(LOSSES)}")
    check(process, objective)
    z_t = corrupt(process, z0, noise, t)
    said = denoiser(z_t, t, cond)
    prediction, v = learned_variance.split(said) if objective.learned_variance else (said, None)
    # A prediction of [B, H, W, 1] would broadcast to a plausible number.
    assert prediction.shape == noise.shape, (
        f"prediction {said.shape} must have z0's shape {noise.shape}, its channels twice with "
        "learned_variance"
    )
    f32 = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    prediction = f32(prediction)
    target = f32(parameterisation.target(process, objective.parameterisation, z0, noise, t))
    penalty = LOSSES[loss](prediction - target)
    value = jnp.mean(penalty, axis=tuple(range(1, penalty.ndim)))
    if objective.weight != "simple":
        value = value * weight(process, objective, t)
    if uncertainty is not None:
        value = value * jnp.exp(-uncertainty(t)) + uncertainty(t)
    if objective.cosine_weight:
        value = value + objective.cosine_weight * direction_error(prediction, target)
    if v is not None:
        bound = learned_variance.hybrid_vlb(process, f32(z0), f32(z_t), prediction, f32(v), t)
        value = value + learned_variance.hybrid_weight(process) * bound
    return value
