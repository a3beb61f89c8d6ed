"""A denoiser's training: its draws, and the loss of each example."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import noise_levels, objective
from ldm_jax.diffusion.objective import Objective
from ldm_jax.diffusion.process import Process, at_network
from ldm_jax.errors import choose, within
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import conditions, denoiser
from ldm_jax.models.denoiser import DenoiserConfig
from ldm_jax.models.latents import Codec
from ldm_jax.sharding import constrain
from ldm_jax.train import uncertainty
from ldm_jax.train.step import Batch, Loss, Seen, draw_keys, positions

INDEX = "index"
"""The entry of a batch that says which example of the data set each row is."""


@dataclasses.dataclass(frozen=True)
class DenoiserLoss:
    kind: str = "l2"  # "l1" | "l2", mean over the latent
    condition_dropout: float = 0.1  # probability of training an example without its conditions
    second_half_weight: float = 1.0  # of its channels in the mean, where the latent has two halves

    def __post_init__(self):
        choose("loss", self.kind, sorted(objective.LOSSES))
        within("condition_dropout", self.condition_dropout, "[0, 1)")
        within("second_half_weight", self.second_half_weight, "[0, inf)", "1 = as the first half's")

    def channel_weights(self, halves: tuple[int, int]) -> np.ndarray | None:
        """f32 [C] of the channels of a latent's halves; None where all weigh the same."""
        first, second = halves
        if not second or self.second_half_weight == 1:
            return None
        return np.repeat(np.array([1, self.second_half_weight], np.float32), (first, second))


@dataclasses.dataclass(frozen=True)
class Denoising:
    """All that a denoiser's loss depends on."""

    model: DenoiserConfig
    process: Process
    objective: Objective
    codec: Codec
    loss: DenoiserLoss
    seed: int  # of every draw


class Examples(NamedTuple):
    """What the loss of each example is, and of what."""

    loss: jax.Array  # f32 [B]
    times: jax.Array  # f32 [B], 0 = data, 1 = noise
    z0: jax.Array  # f32 [B,h,w,C], what the network should have found
    x0: jax.Array  # f32 [B,h,w,C], what it says of it


PerExample = Callable[[Any, Any, Batch, Any], Examples]
"""(trained parameters, frozen networks, batch, step) -> losses."""


def per_example(denoising: Denoising) -> PerExample:
    """{"moments": f32 [B,h,w,M], entries of the conditions ...} -> each example's denoising loss.

    Every draw is a function of the seed, the step and the row's position in the global batch, but
    for the posterior's where the codec draws once for each example: that is of the seed and INDEX,
    int32 [B]. The loss is by the uncertainty where the parameters have one, which an average has
    not: evaluation is plain.
    """
    model, process, config = denoising.model, denoising.process, denoising.objective

    def compute(params: Any, frozen: Any, batch: Batch, step: Any) -> Examples:
        rows = positions(batch)

        def keys(purpose: str) -> jax.Array:
            return draw_keys(denoising.seed, purpose, step, rows)

        def network(z_t: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
            return denoiser.apply(model, params, z_t, t, cond)

        def log_loss(t: jax.Array) -> jax.Array:
            return uncertainty.apply(params["uncertainty"], process.unit_time(t))

        posterior = keys("posterior")
        if denoising.codec.draws == "example":
            posterior = example_keys(key_for(denoising.seed, "posterior"), batch[INDEX])
        z0 = denoising.codec.encode(batch["moments"], posterior)
        noise = constrain(normal_like(keys("noise"), z0), "batch", "height", "width", "channels")
        t = noise_levels.draw_times(process, config.noise_levels, keys("timestep"))
        dropped = jax.vmap(jax.random.uniform)(keys("condition_dropout"))
        cond = {name: batch[name] for name in conditions.entries(model.conditions)}
        cond = conditions.drop(model.conditions, cond, dropped < denoising.loss.condition_dropout)
        if config.offset_noise:
            noise = objective.offset(config, keys("offset_noise"), noise)
        learned = bool(config.uncertainty) and "uncertainty" in params
        denoised = objective.denoising_loss(
            at_network(process, network),
            process,
            config,
            z0=z0,
            noise=noise,
            t=t,
            cond=cond,
            penalty=denoising.loss.kind,
            uncertainty=log_loss if learned else None,
            channel_weights=denoising.loss.channel_weights(denoising.codec.halves),
        )
        return Examples(denoised.loss, process.unit_time(t), z0, denoised.x0)

    return compute


def training_loss(losses: PerExample, bins: int = 0) -> Loss:
    """The mean of `losses`, and of `bins` equal intervals of time the sums and counts."""

    def compute(
        trained: Any, extra: dict[str, Any], frozen: Any, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Seen]:
        examples = losses(trained, frozen, batch, step)
        metrics = sums_by_bin(examples.loss, examples.times, bins)
        return examples.loss.mean(), Seen(metrics, {})

    return compute


def bin_of(times: jax.Array | np.ndarray, bins: int) -> jax.Array:
    """Which of `bins` equal intervals of [0, 1] each time lies in, int32, from 0."""
    return jnp.clip(jnp.floor(jnp.asarray(times) * bins).astype(jnp.int32), 0, bins - 1)


def sums_by_bin(losses: jax.Array, times: jax.Array, bins: int) -> dict[str, jax.Array]:
    """`loss_bin/K/sum` and `loss_bin/K/count` of losses [B] at times [B]; no bins, no entries."""
    if not bins:
        return {}
    inside = bin_of(times, bins)[:, None] == jnp.arange(bins)[None]  # [B, bins]
    sums = jnp.where(inside, losses[:, None], 0.0).sum(0)
    counts = inside.sum(0).astype(jnp.float32)
    return {f"loss_bin/{k}/sum": sums[k] for k in range(bins)} | {
        f"loss_bin/{k}/count": counts[k] for k in range(bins)
    }
