"""The adversary of a first stage: its losses, its weight, the discriminator's turn.

Everything the discriminator carries from step to step lives in one dict: `params`, `optimizer`,
`statistics` (of batch norm) and, with LeCam, `lecam`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.errors import InputError, choose, within
from ldm_jax.models import discriminator
from ldm_jax.models.discriminator import DiscriminatorConfig

LECAM_DECAY = 0.99  # of the moving averages of logits that LeCam anchors to


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    weight: float = 0.0  # of the generator's loss, on top of its adaptation; 0 = no discriminator
    start: int = 0  # updates without it; before, the discriminator is neither run nor trained
    loss: str = "hinge"  # "hinge" | "vanilla", the discriminator's
    adaptive: bool = True  # published: balance the gradients at the decoder's last layer
    max_adaptive_weight: float = 1e4
    lr_factor: float = 1.0  # discriminator's learning rate over the autoencoder's
    lecam_weight: float = 0.0  # pulls logits to the other side's average (Tseng et al., CVPR 2021)
    gradient_penalty: float = 0.0  # R1 gamma (Mescheder et al., ICML 2018), by the mean logit
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self):
        if self.start >= 2**31:
            raise InputError(f"adversarial start {self.start} must be below 2**31")
        choose("adversarial loss", self.loss, sorted(LOSSES))
        for field in dataclasses.fields(self):
            if field.type in (int, float):
                within(f"adversarial {field.name}", getattr(self, field.name), "[0, inf)")


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Half the sum of the two hinges, means over all logits."""
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())


def vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Half the sum of the two cross-entropies, means over all logits."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "hinge": hinge,
    "vanilla": vanilla,
}


def generator_loss(config: DiscriminatorConfig, params: Any, x_hat: jax.Array) -> jax.Array:
    """Minus the mean logit of the reconstructions, for either of the discriminator's losses."""
    return -discriminator.apply(config, params, x_hat)[0].mean()


def adaptive_weight(
    reconstruction_gradient: jax.Array, generator_gradient: jax.Array, limit: float
) -> jax.Array:
    """What balances the two gradients at the decoder's last layer, in [0, limit].

    Esser et al., CVPR 2021, eq. 7, with the published offset of 1e-4.
    """
    ratio = _norm(reconstruction_gradient) / (_norm(generator_gradient) + 1e-4)
    return jnp.clip(ratio, 0.0, limit)


def _norm(gradient: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(gradient).sum())


def start(
    config: AdversarialConfig,
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    channels: int,
) -> dict[str, Any]:
    """What the discriminator carries before its first update."""
    params = discriminator.init(config.discriminator, key, channels)
    carried = {"params": params, "optimizer": optimizer.init(params)}
    if config.discriminator.norm == "batch":
        carried["statistics"] = discriminator.init_statistics(config.discriminator, channels)
    if config.lecam_weight:
        carried["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
    return carried


def started(config: AdversarialConfig, params: Any, x_hat: jax.Array, step: jax.Array) -> Any:
    """The discriminator's parameters; at `start`, act norms are set by the reconstructions."""
    if config.discriminator.norm != "act":
        return params
    return jax.lax.cond(
        step == config.start,
        lambda p: discriminator.start_act_norm(config.discriminator, p, x_hat),
        lambda p: p,
        params,
    )


def discriminator_turn(
    config: AdversarialConfig,
    optimizer: optax.GradientTransformation,
    carried: dict[str, Any],
    x: jax.Array,
    x_hat: jax.Array,
    step: jax.Array,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One update on images and their reconstructions f32 [B,H,W,3]; nothing before `start`.

    The published training encodes and decodes the batch once more for this turn; here it sees the
    reconstructions that the autoencoder's turn made. Batch norm sees originals and reconstructions
    in batches of their own, as published.
    """

    def turn(carried):
        params = started(config, carried["params"], x_hat, step)
        gradient = jax.value_and_grad(_discriminator_loss, argnums=1, has_aux=True)
        (loss, (real, fake, statistics)), grads = gradient(config, params, carried, x, x_hat, step)
        updates, opt_state = optimizer.update(grads, carried["optimizer"], params)
        new = {"params": optax.apply_updates(params, updates), "optimizer": opt_state}
        if config.discriminator.norm == "batch":
            running = carried["statistics"]
            for batch in statistics:
                running = discriminator.update_statistics(running, batch)
            new["statistics"] = running
        if config.lecam_weight:
            decay = jnp.where(step == config.start, 0.0, LECAM_DECAY)  # the first batch starts it
            new["lecam"] = {
                name: decay * carried["lecam"][name] + (1 - decay) * logit
                for name, logit in (("real", real), ("fake", fake))
            }
        return new, {"discriminator": loss, "logit_real": real, "logit_fake": fake}

    def wait(carried):
        zero = jnp.zeros(())
        return carried, {"discriminator": zero, "logit_real": zero, "logit_fake": zero}

    return jax.lax.cond(step >= config.start, turn, wait, carried)


def _discriminator_loss(config, params, carried, x, x_hat, step):
    real, of_real = discriminator.apply(config.discriminator, params, x)
    fake, of_fake = discriminator.apply(config.discriminator, params, x_hat)
    loss = LOSSES[config.loss](real, fake)
    if config.lecam_weight:
        anchors = carried["lecam"]
        loss += (
            config.lecam_weight
            * (step > config.start)
            * (
                jnp.square(jax.nn.relu(real - anchors["fake"])).mean()
                + jnp.square(jax.nn.relu(anchors["real"] - fake)).mean()
            )
        )
    if config.gradient_penalty:
        # Of each image's mean logit, so that the penalty's meaning does not grow with its size.
        def logits(images):
            return (
                discriminator.apply(config.discriminator, params, images)[0].mean((1, 2, 3)).sum()
            )

        slope = jnp.square(jax.grad(logits)(x)).sum((1, 2, 3)).mean()
        loss += 0.5 * config.gradient_penalty * slope
    return loss, (real.mean(), fake.mean(), (of_real, of_fake))


def axes(config: AdversarialConfig, channels: int) -> Any:
    """Logical axes of the discriminator's parameters, from which all it carries is sharded."""
    return discriminator.axes(config.discriminator, channels)
