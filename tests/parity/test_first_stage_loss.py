"""The whole loss of a first stage against torch: total, adaptive weight, the discriminator's loss.

One fixed batch through diffusers' autoencoder, the lpips package and a torch.nn discriminator; the
loss is put together here from the published facts. Only the posterior's noise is shared.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch

from ldm_jax.interop import names
from ldm_jax.interop.autoencoder_names import diffusers_names, shapes
from ldm_jax.keys import normal_like
from ldm_jax.models import autoencoder, discriminator, quantizer
from ldm_jax.train import adversarial
from ldm_jax.train.first_stage import AutoencoderLoss, Recipe, autoencoder_loss
from ldm_jax.train.step import draw_keys
from tests.parity import reference, test_discriminator, test_perceptual

pytestmark = pytest.mark.parity

SIDE, SEED, STEP = 32, 3, 5
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
MODEL = autoencoder.AutoencoderConfig(
    resolution=SIDE,
    width=8,
    width_multipliers=(1, 2),
    num_res_blocks=1,
    z_channels=3,
    latent_channels=3,
    norm_groups=4,
    compute_dtype="float32",
)
VQ = dataclasses.replace(MODEL, latent="vq", quantizer=quantizer.QuantizerConfig(codebook_size=32))
NETWORK = discriminator.DiscriminatorConfig(width=8, num_layers=2, compute_dtype="float32")
RECIPES = {
    "kl": Recipe(
        MODEL,
        AutoencoderLoss(),
        adversarial.AdversarialConfig(weight=0.5, start=STEP, discriminator=NETWORK),
        SEED,
    ),
    "vq": Recipe(
        VQ,
        AutoencoderLoss(reduction="mean"),
        adversarial.AdversarialConfig(
            weight=0.75, start=STEP, loss="vanilla", discriminator=NETWORK
        ),
        SEED,
    ),
}


def their_models(recipe):
    model = reference.randomize(reference.first_stage(recipe.model)).train()
    return model, test_discriminator.their_model(NETWORK), test_perceptual.their_model().eval()


@functools.cache
def theirs(kind):
    """Total, its parts, gradients by the autoencoder's parameters, and the discriminator's loss."""
    recipe = RECIPES[kind]
    model, critic, lpips = their_models(recipe)
    x = reference.to_torch(IMAGES.astype(np.float32) / 127.5 - 1)
    if kind == "kl":
        mean, logvar = model.encode(x).latent_dist.parameters.chunk(2, 1)
        like = jax.ShapeDtypeStruct((3, SIDE // 2, SIDE // 2, 3), np.float32)
        noise = reference.to_torch(
            normal_like(draw_keys(SEED, "posterior", STEP, np.arange(3)), like)
        )
        logvar = logvar.clamp(-30, 20)
        x_hat = model.decode(mean + torch.exp(0.5 * logvar) * noise).sample
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3))
        regulariser = 1e-6 * kl.mean()
    else:
        z = model.encode(x).latents
        codebook = model.quantize.embedding.weight
        rows = z.permute(0, 2, 3, 1).reshape(-1, 1, 3)
        nearest = ((rows - codebook) ** 2).sum(-1).argmin(1)
        z_q = codebook[nearest].reshape(3, SIDE // 2, SIDE // 2, 3).permute(0, 3, 1, 2)
        regulariser = ((z_q.detach() - z) ** 2).mean() + 0.25 * ((z_q - z.detach()) ** 2).mean()
        x_hat = model.decoder(model.post_quant_conv(z + (z_q - z).detach()))

    rec = (x - x_hat).abs() + lpips(x, x_hat)  # [B,1,1,1], spread over every element
    nll = rec.sum() / len(x) if kind == "kl" else rec.mean()
    g_loss = -critic(x_hat).mean()
    last = model.decoder.conv_out.weight
    by_nll, by_g = (torch.autograd.grad(a, last, retain_graph=True)[0] for a in (nll, g_loss))
    weight = torch.clamp(by_nll.norm() / (by_g.norm() + 1e-4), 0, 1e4)
    weight = (recipe.adversarial.weight * weight).detach()
    total = nll + weight * g_loss + regulariser
    model.zero_grad()
    total.backward()
    real, fake = critic(x), critic(x_hat.detach())
    if recipe.adversarial.loss == "hinge":
        of_critic = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    else:
        softplus = torch.nn.functional.softplus
        of_critic = 0.5 * (softplus(-real).mean() + softplus(fake).mean())
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    scalars = dict(total=total, nll=nll, g=g_loss, weight=weight, critic=of_critic)
    return {name: value.item() for name, value in scalars.items()}, gradients


@functools.cache
def ours(kind):
    recipe = RECIPES[kind]
    model, critic, _ = their_models(recipe)
    name_map = diffusers_names(recipe.model)
    params = reference.parameters(model, name_map, shapes(recipe.model))
    adversary = test_discriminator.as_tree(NETWORK, reference.tensors(critic))

    @jax.jit
    def answers(params, adversary, perceptual):
        def compute(p):
            return autoencoder_loss(
                recipe, p, {"image": IMAGES}, np.int32(STEP), adversary, perceptual
            )

        (total, seen), gradients = jax.value_and_grad(compute, has_aux=True)(params)
        real, fake = (
            discriminator.apply(NETWORK, adversary, seen.arrays[name])[0] for name in ("x", "x_hat")
        )
        metrics = seen.metrics
        scalars = {
            "total": total,
            "nll": metrics["reconstruction"],
            "g": metrics["generator"],
            "weight": metrics["adversarial_weight"],
            "critic": adversarial.LOSSES[recipe.adversarial.loss](real, fake),
        }
        return scalars, gradients

    scalars, gradients = answers(params, adversary, test_perceptual.our_params())
    return scalars, names.to_theirs(name_map, gradients)


@pytest.mark.parametrize("kind", RECIPES)
def test_losses_and_weight_are_the_reference(kind):
    want, got = theirs(kind)[0], ours(kind)[0]
    assert 0 < want["weight"] < 1e4 * RECIPES[kind].adversarial.weight  # the clamp is not all
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", RECIPES)
def test_gradients_are_the_reference(kind):
    want, got = theirs(kind)[1], ours(kind)[1]
    assert want.keys() == got.keys()
    largest = max(np.abs(w).max() for w in want.values())
    for name, gradient in want.items():
        scale = np.abs(gradient).max()
        tolerance = 1e-3 * scale + 1e-6 * largest
        np.testing.assert_allclose(got[name], gradient, atol=tolerance, rtol=0, err_msg=name)
