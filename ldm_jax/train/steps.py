"""The denoiser's training step: a pure function (state, batch) -> (state, metrics), compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax.diffusion import noise_levels, objective
from ldm_jax.diffusion.process import Process, at_network
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like
from ldm_jax.models import denoiser, latents
from ldm_jax.sharding import batch_sharding, constrain, replicated, use_mesh
from ldm_jax.train import ema as ema_lib
from ldm_jax.train.state import TrainState

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
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


def draw_keys(seed: int, purpose: str, step: jax.Array, batch_size: int) -> jax.Array:
    """One key per example of the global batch [B], whatever the mesh."""
    return example_keys(key_for(seed, purpose, step), jnp.arange(batch_size))


def denoiser_draws(
    seed: int,
    step: jax.Array,
    moments: jax.Array,
    channels: int,
    draw_times: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Every random draw of one denoiser step, from the global position in the batch alone.

    moments [B,h,w,2C or C] -> z [B,h,w,C] (unwhitened), noise like z, t = draw_times(keys) [B],
    uniform f32 [B].
    """
    keys = lambda purpose: draw_keys(seed, purpose, step, moments.shape[0])  # noqa: E731
    z = latents.draw(moments, keys("posterior"), channels)
    return {
        "z": z,
        "noise": constrain(normal_like(keys("noise"), z), "batch", "height", "width", "channels"),
        "t": draw_times(keys("timestep")),
        "uniform": jax.vmap(jax.random.uniform)(keys("condition_dropout")),
    }


def denoiser_loss(
    config: denoiser.Config,
    loss: DenoiserLoss,
    process: Process,
    whitening: latents.Whitening,
    seed: int,
    aim: objective.Objective = objective.Objective(),
) -> Loss:
    """{"moments": f32 [B,h,w,2C or C], conditions ...} -> the denoising loss."""
    draw_times = lambda keys: noise_levels.draw_times(process, aim.noise_levels, keys)  # noqa: E731

    def compute(params, batch, step):
        channels = len(whitening.shift)
        draws = denoiser_draws(seed, step, batch["moments"], channels, draw_times)
        cond = {name: batch[name] for name in denoiser.condition_names(config)}
        cond = denoiser.drop_condition(config, cond, draws["uniform"] < loss.label_dropout)
        z0 = whitening.whiten(draws["z"])
        network = lambda z_t, t, c: denoiser.apply(config, params, z_t, t, c)  # noqa: E731
        noise = draws["noise"]
        if aim.offset_noise:
            keys = draw_keys(seed, "offset_noise", step, len(noise))
            noise = objective.offset(aim, keys, noise)
        per_example = objective.denoising_loss(
            at_network(process, network), process, z0, cond, draws["t"], noise, loss.kind, aim
        )
        return per_example.mean(), {}

    return compute


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    ema: ema_lib.Config,
    mesh: Mesh,
    shardings: TrainState,
) -> Step:
    """Gradient, update and moving average of one step; the state is donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        with use_mesh(mesh):
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, parts), grads = gradient(state.params, batch, state.step)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            average = state.ema
            if ema.decay:
                average = ema_lib.update(average, params, ema_lib.decay_at(ema, state.step + 1))
            metrics = {
                "loss": value,
                **parts,
                "grad_norm": optax.tree.norm(grads),
                "lr": jnp.asarray(learning_rate(state.step), jnp.float32),
            }
            return TrainState(state.step + 1, params, average, opt_state), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
