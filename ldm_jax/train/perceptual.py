"""The latent perceptual loss in a denoiser's training: its weight, its rows, its figures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.diffusion import parameterisation, perceptual
from ldm_jax.diffusion.perceptual import PerceptualConfig
from ldm_jax.errors import InputError
from ldm_jax.models import autoencoder
from ldm_jax.models.autoencoder import AutoencoderConfig
from ldm_jax.sharding import active_batch_shards, constrain
from ldm_jax.train.denoiser import Denoising, PerExample, sums_by_bin
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import AfterUpdate, Batch, Loss, Seen, draw_keys, positions

FROZEN = "first_stage"  # the decoder, among the networks that are read
STATE = "lpl"  # in the state's `extra`


@dataclasses.dataclass(frozen=True)
class Perceptual:
    """All that the loss depends on beside the denoising one."""

    config: PerceptualConfig
    first_stage: AutoencoderConfig
    denoising: Denoising
    count: int  # rows of a micro-batch that are decoded


def check(config: PerceptualConfig, first_stage: AutoencoderConfig) -> None:
    """Raises InputError for a first stage that has no such maps."""
    if first_stage.latent == "identity":
        raise InputError(
            "lpl compares maps of the first stage's decoder, and an identity has none; set "
            "--config.lpl.weight=0 and --config.lpl.target_ratio=0"
        )
    perceptual.tap_indices(config, len(autoencoder.decoder_taps(first_stage)))


def decoder_of(params: Any) -> dict[str, Any]:
    """What of a first stage's parameters, or of their axes, the loss reads."""
    return {name: params[name] for name in ("decoder", "quantizer") if name in params}


def init_state(config: PerceptualConfig) -> dict[str, jax.Array]:
    """What a run carries of it, f32 [] each: the weight, and what it is calibrated by."""
    zero = jnp.zeros((), jnp.float32)
    return {
        "weight": jnp.asarray(config.weight, jnp.float32),
        "calibrated_on": zero,  # steps
        "diffusion": zero,  # sums over them
        "perceptual": zero,
        "since": -jnp.ones((), jnp.float32),  # the first step that it weighed in; -1 = none yet
    }


def training_loss(losses: PerExample, of: Perceptual, bins: int = 0) -> Loss:
    """The mean of `losses` plus the weighted perceptual loss of their estimates of the data.

    Its gradient by the estimate is taken apart, with the decoder's activations gone before the
    denoiser's backward pass, and goes on from there: so the norms of both gradients at the
    prediction are known for nothing. A step without the loss decodes nothing.
    """
    config, process = of.config, of.denoising.process
    name = of.denoising.objective.parameterisation

    def compute(
        trained: Any, extra: dict[str, Any], frozen: Any, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Seen]:
        examples = losses(trained, frozen, batch, step)
        loss_of, native_times = examples.loss_of, examples.native_times
        assert loss_of is not None and native_times is not None
        state = extra[STATE]
        keys = draw_keys(of.denoising.seed, "lpl_rows", step, positions(batch))
        z0, x0, times, order = jax.lax.stop_gradient(
            (examples.z0, examples.x0, native_times, jax.vmap(jax.random.uniform)(keys))
        )
        ratio = perceptual.noise_ratio(process, times)

        def distance(x0: jax.Array) -> tuple[jax.Array, perceptual.PerceptualLoss]:
            found = perceptual.perceptual_loss(
                config,
                lambda z: _maps(of, frozen[FROZEN], z),
                x0,
                z0,
                ratio,
                order,
                of.count,
                place=lambda z: constrain(z, "batch", "height", "width", "channels"),
                multiple=active_batch_shards(),
            )
            return found.value, found

        def on() -> tuple[perceptual.PerceptualLoss, jax.Array]:
            (_, found), slope = jax.value_and_grad(distance, has_aux=True)(x0)
            return found, slope

        def off() -> tuple[perceptual.PerceptualLoss, jax.Array]:
            shapes = jax.eval_shape(on)
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        due = (step >= config.start_step) & (step % config.every == 0)
        # On a CPU, XLA's convolutions take four times as long inside a conditional.
        always = config.every == 1 and not config.start_step
        found, slope = on() if always else jax.lax.cond(due, on, off)
        weight = state["weight"] * config.every
        through = jnp.sum(slope * examples.x0)
        value = weight * (found.value + (through - jax.lax.stop_gradient(through)))
        diffusion = examples.loss.mean()

        sigma = process.coefficients(times)[1]
        det = parameterisation.determinant(process, name, times)
        # d x0 / d output; at no noise the output is not in it.
        per_output = jnp.where(sigma > 0, -sigma / jnp.where(sigma > 0, det, 1.0), 0.0)
        per_output = per_output.reshape(-1, *[1] * (slope.ndim - 1)).astype(slope.dtype)
        towards = jax.grad(lambda output: loss_of(output).mean())(
            jax.lax.stop_gradient(examples.output)
        )
        share = weight * optax.tree.norm(slope * per_output) / optax.tree.norm(towards)
        counted = due.astype(jnp.float32)
        seen = {
            "loss_lpl": found.value,
            "lpl_kept": found.kept,
            "lpl_gated": found.gated,
            "lpl_gradient_ratio": share,
        }
        metrics = sums_by_bin(examples.loss, examples.times, bins)
        metrics |= {"loss_diffusion": diffusion, "lpl_weight": state["weight"]}
        for key, figure in seen.items():
            metrics |= {f"{key}/sum": figure * counted, f"{key}/count": counted}
        return diffusion + value, Seen(metrics, {})

    return compute


def after_update(config: PerceptualConfig) -> AfterUpdate:
    """Finds the weight once, where a ratio is asked for, from the losses of the first steps.

    Until then the weight is 0.
    """

    def turn(
        old: TrainState, params: Any, extra: dict[str, Any], seen: Seen
    ) -> tuple[Any, dict[str, Any]]:
        state, count = extra[STATE], seen.metrics["loss_lpl/count"]
        due = count > 0
        since = jnp.where(
            due & (state["weight"] > 0) & (state["since"] < 0), 1.0 * old.step, state["since"]
        )
        state = {**state, "since": since}
        if config.target_ratio:
            open_ = due & (state["weight"] == 0)
            on = jnp.where(open_, 1.0, 0.0)
            lpl = seen.metrics["loss_lpl/sum"] / jnp.maximum(count, 1.0)
            state["calibrated_on"] += on
            state["diffusion"] += on * seen.metrics["loss_diffusion"]
            state["perceptual"] += on * lpl
            enough = state["calibrated_on"] >= config.calibration_steps
            # Where no example was near enough to the data yet, it goes on looking.
            ready = open_ & enough & (state["perceptual"] > 0)
            found = config.target_ratio * state["diffusion"] / state["perceptual"]
            state["weight"] = jnp.where(ready, found, state["weight"])
        return params, {**extra, STATE: state}

    return turn


def _maps(of: Perceptual, params: Any, z0: jax.Array) -> list[jax.Array]:
    """The decoder's maps of the denoiser's latents [K,h,w,channels]."""
    model = dataclasses.replace(of.first_stage, compute_dtype=of.config.compute_dtype)
    taps = perceptual.tap_indices(of.config, len(autoencoder.decoder_taps(model)))
    z = of.denoising.codec.decode(z0)
    return autoencoder.decoder_maps(model, params, z, max(taps) + 1, remat=of.config.remat)
