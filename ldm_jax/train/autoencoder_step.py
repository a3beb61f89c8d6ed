"""One step of a first stage: the autoencoder's turn, the discriminator's, a codebook's upkeep."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ldm_jax.keys import key_for
from ldm_jax.models import quantizer
from ldm_jax.sharding import batch_sharding, replicated, use_mesh
from ldm_jax.train import adversarial
from ldm_jax.train import ema as ema_lib
from ldm_jax.train.first_stage_loss import Recipe, autoencoder_loss
from ldm_jax.train.gradient import Batch, value_and_grad
from ldm_jax.train.guard import keep_finite, updates_done
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import Step


def start_extra(
    recipe: Recipe, params: Any, discriminator_optimizer: optax.GradientTransformation
) -> dict[str, Any]:
    """What the training carries besides the model: a discriminator, and a codebook's counts."""
    extra: dict[str, Any] = {}
    if recipe.adversarial.weight:
        key = key_for(recipe.seed, "discriminator_init")
        channels = recipe.model.image_channels
        extra["discriminator"] = adversarial.start(
            recipe.adversarial, key, discriminator_optimizer, channels
        )
    if recipe.model.latent == "vq" and recipe.model.quantizer.keeps_counts:
        extra["codes"] = quantizer.start_counts(params["quantizer"]["codebook"])
    return extra


def accumulates(recipe: Recipe) -> bool:
    """Whether a batch may be taken in parts: adversary and codebook are trained on a whole one."""
    return not recipe.adversarial.weight and recipe.model.latent != "vq"


def make_autoencoder_step(
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    ema: ema_lib.EmaConfig,
    mesh: Mesh,
    shardings: TrainState,
    perceptual: Any,
    accumulate: int = 1,
) -> Step:
    """The autoencoder's turn, the discriminator's, the codebook's upkeep and the moving average.

    Both turns are one sharded program, whose state is donated. `perceptual` are LPIPS' parameters
    or None. The gradient is taken in `accumulate` micro-batches, where nothing but the gradient is
    made of the batch: without an adversary and without a codebook. Where the loss, the gradient or
    the discriminator's new parameters are not finite, nothing changes but the step's number, and
    the metric `skipped` is 1.
    """
    assert accumulate == 1 or accumulates(recipe), "an adversary and a codebook see whole batches"

    def step(state: TrainState, batch: Batch, perceptual: Any):
        with use_mesh(mesh):
            extra = dict(state.extra)
            adversary = extra["discriminator"]["params"] if "discriminator" in extra else None

            def loss(params, batch, step):
                value, seen = autoencoder_loss(recipe, params, batch, step, adversary, perceptual)
                return value, seen if accumulate == 1 else seen["metrics"]

            (value, seen), grads = value_and_grad(
                loss,
                state.params,
                batch,
                state.step,
                count=accumulate,
                shardings=shardings.params,
            )
            seen = seen if accumulate == 1 else {"metrics": seen}
            metrics = {"loss": value, **seen["metrics"], "grad_norm": optax.tree.norm(grads)}
            if adversary is not None:
                extra["discriminator"], of_turn = adversarial.discriminator_turn(
                    recipe.adversarial,
                    discriminator_optimizer,
                    extra["discriminator"],
                    seen["x"],
                    seen["x_hat"],
                    state.step,
                )
                metrics |= of_turn
            done = updates_done(state.opt_state)
            metrics["lr"] = jnp.asarray(learning_rate(done), jnp.float32)
            judged = [value, metrics["grad_norm"]]
            if adversary is not None:
                judged.append(optax.tree.norm(extra["discriminator"]["params"]))

            def update(state: TrainState) -> TrainState:
                carried = dict(extra)
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
                params: Any = optax.apply_updates(state.params, updates)
                # Weight decay moves even what has no gradient.
                params = {
                    n: p if n in recipe.trained else state.params[n] for n, p in params.items()
                }
                if "codes" in carried and "quantizer" in recipe.trained:
                    codebook, carried["codes"] = quantizer.upkeep(
                        recipe.model.quantizer,
                        params["quantizer"]["codebook"],
                        carried["codes"],
                        seen["z"],
                        seen["indices"],
                        key_for(recipe.seed, "codebook_restart", state.step),
                    )
                    params["quantizer"] = {"codebook": codebook}
                n = state.step + 1
                main, averages = ema_lib.advance(ema, state.ema, state.averages, params, n)
                return TrainState(n, params, main, opt_state, carried, averages)

            new, metrics["skipped"] = keep_finite(state, update, *judged)
            return new, metrics

    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    return lambda state, batch: compiled(state, batch, perceptual)
