"""The denoiser's training step: a pure function (state, batch) -> (state, metrics), compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ldm_jax.diffusion import noise_levels, objective
from ldm_jax.diffusion.process import Process, at_network, unit_time
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import denoiser, latents
from ldm_jax.sharding import batch_sharding, constrain, replicated, use_mesh
from ldm_jax.train import ema as ema_lib
from ldm_jax.train.gradient import Batch, Loss, positions, value_and_grad
from ldm_jax.train.guard import keep_finite, updates_done
from ldm_jax.train.state import TrainState
from ldm_jax.train.uncertainty import apply as uncertainty_of

# (params, batch, step) -> losses f32 [B], and times [B], 0 = data, 1 = noise
PerExample = Callable[[Any, Batch, Any], tuple[jax.Array, jax.Array]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class DenoiserLoss:
    kind: str = "l2"  # "l1" | "l2", mean over the latent
    label_dropout: float = 0.1  # probability of training an example without its condition

    def __post_init__(self):
        if self.kind not in objective.LOSSES:
            raise InputError(
                f"loss {self.kind!r} is unknown; choose one of {sorted(objective.LOSSES)}"
            )
        if not 0 <= self.label_dropout < 1:
            raise InputError(f"label_dropout {self.label_dropout} must be in [0, 1)")


def draw_keys(seed: int, purpose: str, step: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per row [B], from its position in the global batch [B], whatever the mesh."""
    return example_keys(key_for(seed, purpose, step), rows)


def denoiser_draws(
    seed: int,
    step: jax.Array,
    moments: jax.Array,
    rows: jax.Array,
    channels: int,
    draw_times: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Every random draw of one denoiser step, from the rows' positions [B] in the global batch.

    moments [B,h,w,2C or C] -> z [B,h,w,C] (unwhitened), noise like z, t = draw_times(keys) [B],
    uniform f32 [B].
    """
    keys = lambda purpose: draw_keys(seed, purpose, step, rows)  # noqa: E731
    z = latents.draw(moments, keys("posterior"), channels)
    return {
        "z": z,
        "noise": constrain(normal_like(keys("noise"), z), "batch", "height", "width", "channels"),
        "t": draw_times(keys("timestep")),
        "uniform": jax.vmap(jax.random.uniform)(keys("condition_dropout")),
    }


def denoiser_losses(
    config: denoiser.DenoiserConfig,
    loss: DenoiserLoss,
    process: Process,
    whitening: latents.Whitening,
    seed: int,
    aim: objective.Objective = objective.Objective(),
) -> PerExample:
    """{"moments": f32 [B,h,w,2C or C], conditions ...} -> each example's denoising loss.

    It is by the uncertainty where `params` have one, which an average has not: evaluation is plain.
    """
    draw_times = lambda keys: noise_levels.draw_times(process, aim.noise_levels, keys)  # noqa: E731

    def compute(params, batch, step):
        channels, rows = len(whitening.shift), positions(batch)
        draws = denoiser_draws(seed, step, batch["moments"], rows, channels, draw_times)
        cond = {name: batch[name] for name in denoiser.condition_names(config)}
        cond = denoiser.drop_condition(config, cond, draws["uniform"] < loss.label_dropout)
        z0 = whitening.whiten(draws["z"])
        network = lambda z_t, t, c: denoiser.apply(config, params, z_t, t, c)  # noqa: E731
        noise = draws["noise"]
        if aim.offset_noise:
            keys = draw_keys(seed, "offset_noise", step, rows)
            noise = objective.offset(aim, keys, noise)
        u = None
        if aim.uncertainty and "uncertainty" in params:
            u = lambda t: uncertainty_of(params["uncertainty"], unit_time(process, t))  # noqa: E731
        per_example = objective.denoising_loss(
            at_network(process, network), process, z0, cond, draws["t"], noise, loss.kind, aim, u
        )
        return per_example, unit_time(process, draws["t"])

    return compute


def denoiser_loss(losses: PerExample, bins: int = 0) -> Loss:
    """The mean of `losses`, and of `bins` equal intervals of time the sums and counts."""

    def compute(params, batch, step):
        per_example, times = losses(params, batch, step)
        return per_example.mean(), sums_by_bin(per_example, times, bins)

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


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    ema: ema_lib.EmaConfig,
    mesh: Mesh,
    shardings: TrainState,
    accumulate: int = 1,
) -> Step:
    """Gradient, update and moving average of one step; the state is donated.

    `extra` is trained in one tree with the parameters, see `init_state`, but no average is of it.
    The gradient is taken in `accumulate` micro-batches, one after the other. Where the loss or the
    gradient is not finite, nothing changes but the step's number, and the metric `skipped` is 1.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        trained = {**state.params, **state.extra}
        with use_mesh(mesh):
            (value, parts), grads = value_and_grad(
                loss,
                trained,
                batch,
                state.step,
                count=accumulate,
                shardings={**shardings.params, **shardings.extra},
            )

            def update(state: TrainState) -> TrainState:
                trained = {**state.params, **state.extra}
                updates, opt_state = optimizer.update(grads, state.opt_state, trained)
                trained: Any = optax.apply_updates(trained, updates)
                params, extra = (
                    {n: trained[n] for n in old} for old in (state.params, state.extra)
                )
                n = state.step + 1
                main, averages = ema_lib.advance(ema, state.ema, state.averages, params, n)
                return TrainState(n, params, main, opt_state, extra, averages)

            metrics = {
                "loss": value,
                **parts,
                "grad_norm": optax.tree.norm(grads),
                "lr": jnp.asarray(learning_rate(updates_done(state.opt_state)), jnp.float32),
            }
            new, metrics["skipped"] = keep_finite(state, update, value, metrics["grad_norm"])
            return new, metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
