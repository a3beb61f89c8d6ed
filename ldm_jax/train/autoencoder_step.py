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
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import Batch, Step


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


def make_autoencoder_step(
    recipe: Recipe,
    optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    ema: ema_lib.Config,
    mesh: Mesh,
    shardings: TrainState,
    perceptual: Any,
) -> Step:
    """The autoencoder's turn, the discriminator's, the codebook's upkeep and the moving average.

    Both turns are one sharded program, whose state is donated. `perceptual` are LPIPS' parameters
    or None.
    """

    def step(state: TrainState, batch: Batch, perceptual: Any):
        with use_mesh(mesh):
            extra = dict(state.extra)
            adversary = extra["discriminator"]["params"] if "discriminator" in extra else None
            loss = lambda p: autoencoder_loss(  # noqa: E731
                recipe, p, batch, state.step, adversary, perceptual
            )
            (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            # Weight decay moves even what has no gradient.
            params = {n: p if n in recipe.trained else state.params[n] for n, p in params.items()}
            metrics = {"loss": value, **seen["metrics"], "grad_norm": optax.tree.norm(grads)}
            if "codes" in extra and "quantizer" in recipe.trained:
                codebook, extra["codes"] = quantizer.upkeep(
                    recipe.model.quantizer,
                    params["quantizer"]["codebook"],
                    extra["codes"],
                    seen["z"],
                    seen["indices"],
                    key_for(recipe.seed, "codebook_restart", state.step),
                )
                params["quantizer"] = {"codebook": codebook}
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
            n = state.step + 1
            main, averages = ema_lib.advance(ema, state.ema, state.averages, params, n)
            metrics["lr"] = jnp.asarray(learning_rate(state.step), jnp.float32)
            return TrainState(n, params, main, opt_state, extra, averages), metrics

    compiled = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    return lambda state, batch: compiled(state, batch, perceptual)
