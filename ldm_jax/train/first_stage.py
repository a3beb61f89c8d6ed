"""What a first stage is trained on: reconstruction, regulariser, adversary, equivariance.

Esser et al., CVPR 2021 (adversarial loss and its weight); Rombach et al., CVPR 2022 (reductions and
weights).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.errors import choose, within
from ldm_jax.keys import key_for
from ldm_jax.models import autoencoder, latents, quantizer
from ldm_jax.models.frozen import lpips
from ldm_jax.train import adversarial
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import (
    AfterUpdate,
    Batch,
    Loss,
    Seen,
    TakeTurn,
    Turn,
    draw_keys,
    positions,
)

PIXEL_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"l1": jnp.abs, "l2": jnp.square}
EQUIVARIANCE_SCALES = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class AutoencoderLoss:
    """Reductions bite: published KL models *sum* pixels and KL over an image, VQ models take means.

    The weights keep their published meaning under both: kl_weight belongs to the KL and the pixels
    summed over an image, codebook_weight to means over elements; the other reduction multiplies or
    divides the whole by an image's elements. (1e-6 put before means of pixels and of latents, as
    some trainers do, regularises 16 to 48 times too strongly.) LPIPS counts once for every element.
    """

    reduction: str = "sum"  # "sum" over an image, as LDM's KL models | "mean", as its VQ models
    pixel: str = "l1"  # "l1" | "l2"
    pixel_weight: float = 1.0
    kl_weight: float = 1e-6  # of the KL summed over a latent, beside pixels summed over an image
    codebook_weight: float = 1.0  # of the quantizer's loss, a mean, beside a mean over pixels
    perceptual_weight: float = 1.0  # of LPIPS; its weights come from a file
    perceptual_file: str = ""  # empty = where `ldm weights lpips` puts it
    equivariance_weight: float = 0.0  # EQ-VAE: decoded turned and shrunk latents against images

    def __post_init__(self):
        choose("loss reduction", self.reduction, ("sum", "mean"))
        choose("pixel loss", self.pixel, sorted(PIXEL_LOSSES))
        for field in dataclasses.fields(self):
            if field.name.endswith("_weight"):
                within(f"loss {field.name}", getattr(self, field.name), "[0, inf)")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that says what a step of a first stage computes, but for its optimizers."""

    model: autoencoder.AutoencoderConfig
    loss: AutoencoderLoss
    adversarial: adversarial.AdversarialConfig
    seed: int
    train: str = "all"  # "all" | "decoder": the latents of a finished encoder stay valid

    @property
    def trained(self) -> tuple[str, ...]:
        """The groups of parameters that are trained."""
        return ("decoder",) if self.train == "decoder" else ("encoder", "decoder", "quantizer")

    @property
    def needs_whole_batches(self) -> bool:
        """Whether a step's batch cannot be taken in parts: an adversary and a codebook see all."""
        return bool(self.adversarial.weight) or self.model.latent == "vq"


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


def training_loss(recipe: Recipe) -> Loss:
    """`autoencoder_loss`; its adversary is in `extra`, LPIPS is the frozen network `lpips`."""

    def compute(
        trained: Any, extra: dict[str, Any], frozen: Any, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, Seen]:
        adversary = extra["discriminator"]["params"] if "discriminator" in extra else None
        return autoencoder_loss(recipe, trained, batch, step, adversary, frozen.get("lpips"))

    return compute


def discriminators_turn(
    recipe: Recipe, discriminator_optimizer: optax.GradientTransformation
) -> TakeTurn | None:
    """The discriminator's turn, on the reconstructions that the autoencoder's turn made."""
    if not recipe.adversarial.weight:
        return None

    def compute(state: TrainState, seen: Seen) -> Turn:
        carried, metrics = adversarial.discriminator_turn(
            recipe.adversarial,
            discriminator_optimizer,
            state.extra["discriminator"],
            seen.arrays["x"],
            seen.arrays["x_hat"],
            state.step,
        )
        norm = optax.tree.norm(carried["params"])
        return Turn({"discriminator": carried}, metrics, [norm])

    return compute


def after_update(recipe: Recipe) -> AfterUpdate:
    """What follows the autoencoder's turn: frozen parts stay, and the codebook's upkeep."""

    def compute(
        state: TrainState, params: Any, extra: dict[str, Any], seen: Seen
    ) -> tuple[Any, dict[str, Any]]:
        # Weight decay moves even what has no gradient.
        params = {n: p if n in recipe.trained else state.params[n] for n, p in params.items()}
        if "codes" in extra and "quantizer" in recipe.trained:
            codebook, codes = quantizer.upkeep(
                recipe.model.quantizer,
                params["quantizer"]["codebook"],
                extra["codes"],
                seen.arrays["z"],
                seen.arrays["indices"],
                key_for(recipe.seed, "codebook_restart", state.step),
            )
            params["quantizer"], extra = {"codebook": codebook}, {**extra, "codes": codes}
        return params, extra

    return compute


def reconstruction_loss(
    loss: AutoencoderLoss, perceptual: Any, x: jax.Array, x_hat: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pixel and perceptual loss of images f32 [B,H,W,3], and their parts; a mean over images.

    `perceptual` are the parameters of LPIPS; None where its weight is 0.
    """
    error = x_hat - x
    # A sum over an image's elements, or 1: the published models spread LPIPS over every element.
    scale = x[0].size if loss.reduction == "sum" else 1
    total = loss.pixel_weight * scale * PIXEL_LOSSES[loss.pixel](error).mean()
    parts = {"l1": jnp.abs(error).mean(), "mse": jnp.square(error).mean()}
    if perceptual is not None:
        parts["perceptual"] = lpips.lpips(perceptual, x, x_hat).mean()
        total += loss.perceptual_weight * scale * parts["perceptual"]
    return total, parts


def autoencoder_loss(
    recipe: Recipe, params: Any, batch: Batch, step: jax.Array, adversary: Any, perceptual: Any
) -> tuple[jax.Array, Seen]:
    """{"image": uint8 [B,H,W,3]} -> the autoencoder's loss, its metrics, arrays `x`, `x_hat`, ...

    `adversary` are the discriminator's parameters, None without one; `perceptual` those of LPIPS.
    The two gradients that the adaptive weight compares are taken once, with respect to the image,
    and their weighted sum alone goes back through the decoder.
    """
    model, loss = recipe.model, recipe.loss
    params = {
        name: part if name in recipe.trained else jax.lax.stop_gradient(part)
        for name, part in params.items()
    }
    x = autoencoder.to_unit(batch["image"])
    moments = autoencoder.encode(model, params, x)
    keys = draw_keys(recipe.seed, "posterior", step, positions(batch))
    z = autoencoder.draw(model, moments, keys)
    z_decoded, regulariser, metrics, codes = _regularise(recipe, params, moments, z, x[0].size)
    features = autoencoder.decode_features(model, params, z_decoded)
    x_hat = autoencoder.to_image(model, params, features)

    fixed = jax.lax.stop_gradient(x_hat)

    def nll(image):
        return reconstruction_loss(loss, perceptual, x, image)

    (value, parts), cotangent = jax.value_and_grad(nll, has_aux=True)(fixed)
    metrics = {"reconstruction": value, **parts, **metrics}
    if adversary is not None:
        last = jax.lax.stop_gradient((params["decoder"]["conv_out"], features))
        terms = _adversarial_terms(
            recipe, adversary, fixed, cotangent=cotangent, last=last, step=step
        )
        value += terms["adversarial_weight"] * terms["generator"]
        cotangent += terms["adversarial_weight"] * terms.pop("gradient")
        metrics |= terms
    total = _with_gradient(x_hat, value, cotangent) + regulariser
    if loss.equivariance_weight:
        metrics["equivariance"] = _equivariance(recipe, params, perceptual, x, z, step)
        total += loss.equivariance_weight * metrics["equivariance"]
    return total, Seen(metrics, {"x": x, "x_hat": fixed, **codes})


def _regularise(recipe, params, moments, z, elements):
    """The latent to decode, the regulariser's loss, its metrics, and the codes of a VQ model."""
    model, loss = recipe.model, recipe.loss
    if model.latent == "kl":
        kl = latents.kl_to_standard_normal(moments).mean()
        scale = 1 if loss.reduction == "sum" else 1 / elements
        return z, scale * loss.kl_weight * kl, {"kl": kl}, {}
    z_q, indices = quantizer.quantize(params["quantizer"]["codebook"], z)
    q_loss = quantizer.loss(model.quantizer, z, z_q)
    use = quantizer.usage(indices, model.quantizer.codebook_size)
    codes = {"z": jax.lax.stop_gradient(z), "indices": indices}
    z_decoded = quantizer.straight_through(z, z_q)
    scale = 1 if loss.reduction == "mean" else elements
    return z_decoded, scale * loss.codebook_weight * q_loss, {"codebook": q_loss, **use}, codes


def _adversarial_terms(recipe, adversary, x_hat, *, cotangent, last, step):
    """The generator's loss, its weight, its gradient by the image; zeros before its start.

    `last` are the parameters of the decoder's last layer and the features that it sees.
    """
    config, (layer, features) = recipe.adversarial, last

    def turn():
        # Whoever sees the discriminator first sets its act norms, and by the same images.
        network = adversarial.started(config, adversary, x_hat, step)

        def of_image(image):
            return adversarial.generator_loss(config.discriminator, network, image)

        value, gradient = jax.value_and_grad(of_image)(x_hat)
        weight = jnp.float32(config.weight)
        if config.adaptive:

            def image(kernel):
                decoder = {"conv_out": {**layer, "kernel": kernel}}
                return autoencoder.to_image(recipe.model, {"decoder": decoder}, features)

            pullback = jax.vjp(image, layer["kernel"])[1]
            by_kernel = pullback(cotangent)[0], pullback(gradient)[0]
            weight *= adversarial.adaptive_weight(*by_kernel, config.max_adaptive_weight)
        return {"generator": value, "adversarial_weight": weight, "gradient": gradient}

    def wait():
        zero = jnp.zeros(())
        return {"generator": zero, "adversarial_weight": zero, "gradient": jnp.zeros_like(x_hat)}

    return jax.lax.cond(step >= config.start, turn, wait)


def _with_gradient(x, value, cotangent):
    """`value`, whose gradient by x is `cotangent`."""
    product = jnp.sum(x * jax.lax.stop_gradient(cotangent))
    return jax.lax.stop_gradient(value) + (product - jax.lax.stop_gradient(product))


def _equivariance(recipe, params, perceptual, x, z, step):
    """Reconstruction loss of one random turn and scale, latents against images.

    The turn is a multiple of 90 degrees and the scale one of EQUIVARIANCE_SCALES, the same for the
    whole batch. Kouzelis et al., 2025 (EQ-VAE), sec. 3; there scales are continuous and the term
    takes the plain reconstruction's place half of the time, here it is added to it.
    """
    model = recipe.model
    turns = jax.random.randint(key_for(recipe.seed, "equivariance_turn", step), (), 0, 4)

    def small(a, size):
        return jax.image.resize(a, (a.shape[0], size, size, a.shape[-1]), "linear")

    def turned(a):
        return jax.lax.switch(turns, [lambda k=k: jnp.rot90(a, k, (1, 2)) for k in range(4)])

    def at(scale):
        side = max(1, round(z.shape[1] * scale))

        def compute():
            target, latent = turned(small(x, side * model.factor)), turned(small(z, side))
            if model.latent == "vq":
                codes = quantizer.quantize(params["quantizer"]["codebook"], latent)[0]
                latent = quantizer.straight_through(latent, codes)
            features = autoencoder.decode_features(model, params, latent)
            image = autoencoder.to_image(model, params, features)
            return reconstruction_loss(recipe.loss, perceptual, target, image)[0]

        return compute

    key = key_for(recipe.seed, "equivariance_scale", step)
    which = jax.random.randint(key, (), 0, len(EQUIVARIANCE_SCALES))
    return jax.lax.switch(which, [at(scale) for scale in EQUIVARIANCE_SCALES])
