"""A first stage's loss against numpy and plain differentiation; what its step moves, and when."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data import images
from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like
from ldm_jax.models import autoencoder, discriminator, latents, quantizer
from ldm_jax.runs.build import build
from ldm_jax.sharding import MeshConfig, host_array, make_mesh, put_batch
from ldm_jax.train import adversarial, ema, optim
from ldm_jax.train.first_stage import (
    AutoencoderLoss,
    Recipe,
    autoencoder_loss,
    reconstruction_loss,
)
from ldm_jax.train.step import draw_keys
from tests import tiny

PLAIN = AutoencoderLoss(perceptual_weight=0.0)
IMAGES = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)


def recipe(
    model=tiny.AUTOENCODER.model, loss=PLAIN, adversary=tiny.AUTOENCODER.adversarial, **more
):
    return Recipe(model, loss, adversary, 3, **more)


@pytest.fixture
def by_hand(monkeypatch):
    """Encoder and decoder of one multiplication each; moments and images of any size."""
    monkeypatch.setattr(
        autoencoder, "encode", lambda c, p, x: p["encoder"] * jnp.concatenate([x, -x], -1)
    )
    monkeypatch.setattr(autoencoder, "decode_features", lambda c, p, z: p["decoder"] * z)
    monkeypatch.setattr(autoencoder, "to_image", lambda c, p, h: h)
    return autoencoder.AutoencoderConfig(resolution=8, latent_channels=3, width_multipliers=(1,))


def test_loss_sums_over_pixels_and_latents_and_averages_over_images(by_hand):
    """The published reductions: |error| and the KL summed per image, the mean over images."""
    step, p = 7, np.float32(0.9)
    how = recipe(by_hand, dataclasses.replace(PLAIN, kl_weight=0.25))

    @jax.jit
    def compute(p, batch):
        return autoencoder_loss(how, p, batch, np.int32(step), None, None)

    total, seen = compute({"encoder": p, "decoder": p}, {"image": IMAGES})
    parts = seen.metrics

    x = IMAGES / 127.5 - 1.0
    mean, logvar = p * x, -p * x
    noise = normal_like(draw_keys(3, "posterior", step, jnp.arange(5)), jnp.zeros(x.shape))
    error = p * (mean + np.exp(logvar / 2) * np.asarray(noise, np.float64)) - x
    kl = [0.5 * (m**2 + np.exp(v) - 1 - v).sum() for m, v in zip(mean, logvar, strict=True)]
    reconstruction = [np.abs(e).sum() for e in error]
    np.testing.assert_allclose(parts["kl"], np.mean(kl), rtol=1e-5)
    np.testing.assert_allclose(parts["l1"], np.abs(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["mse"], np.square(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(total, np.mean(reconstruction) + 0.25 * np.mean(kl), rtol=1e-5)


def test_published_kl_weight_belongs_to_the_sums():
    assert (PLAIN.kl_weight, PLAIN.reduction) == (1e-6, "sum")


def test_mean_reduction_divides_the_sum_by_the_elements_of_an_image():
    x, x_hat = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)).astype(np.float32)
    for pixel in ("l1", "l2"):
        loss = dataclasses.replace(PLAIN, pixel=pixel)
        total = reconstruction_loss(loss, None, x, x_hat)[0]
        mean = reconstruction_loss(dataclasses.replace(loss, reduction="mean"), None, x, x_hat)[0]
        np.testing.assert_allclose(total, 48 * mean, rtol=1e-6)
        power = {"l1": 1, "l2": 2}[pixel]
        np.testing.assert_allclose(mean, (np.abs(x - x_hat) ** power).mean(), rtol=1e-5)


def test_equivariance_is_nothing_where_the_latent_is_the_image(by_hand, monkeypatch):
    """Turned and shrunk alike, image and latent stay the same; another decoder breaks that."""
    monkeypatch.setattr(
        autoencoder, "encode", lambda c, p, x: jnp.concatenate([x, jnp.full_like(x, -60.0)], -1)
    )
    how = recipe(by_hand, dataclasses.replace(PLAIN, equivariance_weight=2.0))

    def of(factor, step):
        params = {"encoder": {}, "decoder": factor}
        total, seen = autoencoder_loss(how, params, {"image": IMAGES}, step, None, None)
        return total, seen.metrics["equivariance"]

    of = jax.jit(of)
    values = []
    for step in range(12):
        assert of(np.float32(1), np.int32(step))[1] < 1e-3
        total, term = of(np.float32(0.5), np.int32(step))
        assert total > 2.0 * term > 0
        values.append(round(float(term)))
    assert len(set(values)) == 4  # one for each scale: turns change nothing of a sum


VQ = dataclasses.replace(
    tiny.AUTOENCODER.model, latent="vq", quantizer=quantizer.QuantizerConfig(codebook_size=16)
)


@pytest.fixture(scope="module", params=[tiny.AUTOENCODER.model, VQ], ids=["kl", "vq"])
def gradients(request):
    """(ours, plain differentiation's, our metrics) of a loss with everything in it but LPIPS."""
    how = recipe(request.param, dataclasses.replace(PLAIN, reduction="mean", kl_weight=0.1))
    params = autoencoder.init(how.model, jax.random.key(0))
    adversary = discriminator.init(how.adversarial.discriminator, jax.random.key(1))
    step = jnp.int32(how.adversarial.start)

    def plain(params, kernel, part):
        """Of the loss's parts one, seen from the parameters and from the last kernel."""
        last = {**params["decoder"]["conv_out"], "kernel": kernel}
        params = {**params, "decoder": {**params["decoder"], "conv_out": last}}
        x = autoencoder.to_unit(IMAGES)
        z = moments = autoencoder.encode(how.model, params, x)
        if how.model.latent == "kl":
            z = latents.sample(moments, draw_keys(3, "posterior", step, jnp.arange(5)))
            kl = latents.kl_to_standard_normal(moments).mean()
            regulariser = how.loss.kl_weight * kl / x[0].size
        else:
            codebook = params["quantizer"]["codebook"]
            distance = jnp.square(z[..., None, :] - codebook.reshape(1, 1, 1, 16, 2)).sum(-1)
            z_q = codebook[jnp.argmin(distance, -1)]
            regulariser = quantizer.loss(how.model.quantizer, z, z_q)
            z = z + jax.lax.stop_gradient(z_q - z)
        features = autoencoder.decode_features(how.model, params, z)
        x_hat = autoencoder.to_image(how.model, params, features)
        logits = discriminator.apply(how.adversarial.discriminator, adversary, x_hat)[0]
        return {"nll": jnp.abs(x_hat - x).mean(), "g": -logits.mean(), "reg": regulariser}[part]

    def both(params):
        ours, seen = jax.grad(
            lambda p: autoencoder_loss(how, p, {"image": IMAGES}, step, adversary, None),
            has_aux=True,
        )(params)
        kernel = params["decoder"]["conv_out"]["kernel"]

        def norm(part):
            return jnp.linalg.norm(jax.grad(lambda k: plain(params, k, part))(kernel).reshape(-1))

        def of(p, part):
            return plain(p, p["decoder"]["conv_out"]["kernel"], part)

        weight = jnp.clip(norm("nll") / (norm("g") + 1e-4), 0, 1e4) * how.adversarial.weight
        theirs = jax.grad(lambda p: of(p, "nll") + weight * of(p, "g") + of(p, "reg"))(params)
        return ours, theirs, seen.metrics, weight

    return jax.jit(both)(params)


def test_gradient_is_that_of_the_weighted_sum(gradients):
    ours, theirs, metrics, weight = gradients
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-4)
    assert 0 < weight < 5000
    flat = jax.tree_util.tree_leaves_with_path(theirs)
    noise = 1e-6 * max(np.abs(want).max() for _, want in flat)  # keys' biases have no gradient
    for (path, want), got in zip(flat, jax.tree.leaves(ours), strict=True):
        scale = np.abs(want).max()
        assert scale > 0, path
        np.testing.assert_allclose(got, want, atol=1e-4 * scale + noise, err_msg=str(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoencoderLoss(reduction="median"),
        lambda: AutoencoderLoss(pixel="huber"),
        lambda: AutoencoderLoss(kl_weight=-1.0),
        lambda: adversarial.AdversarialConfig(loss="wasserstein"),
        lambda: adversarial.AdversarialConfig(weight=float("nan")),
        lambda: discriminator.DiscriminatorConfig(norm="layer"),
        lambda: discriminator.DiscriminatorConfig(num_layers=0),
        lambda: quantizer.QuantizerConfig(codebook_size=1),
        lambda: quantizer.QuantizerConfig(average_decay=1.0),
        lambda: autoencoder.AutoencoderConfig(latent="fsq"),
        lambda: autoencoder.AutoencoderConfig(latent="identity"),
        lambda: dataclasses.replace(tiny.AUTOENCODER, train="encoder"),
        lambda: dataclasses.replace(tiny.AUTOENCODER, loss=AutoencoderLoss()),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(InputError, match=r"must|choose|set|one level"):
        make()


def started(run):
    """A fresh state of a run on one device, its step, and batches of its images."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    trainer = build(dataclasses.replace(run, ema=ema.EmaConfig(decay=0.0)), None, mesh)
    source = images.open_images(run.images, "train", augment=False)

    def step(state, n):
        rows = (np.arange(run.batch_size) + n * run.batch_size) % len(source)
        batch = put_batch({"image": source.read(rows, rows)["image"]}, mesh, run.batch_size)
        return trainer.step(state, {}, batch)

    return trainer.init(), step


def host(tree):
    return jax.tree.map(host_array, tree)


def same(a, b):
    return [
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


def test_discriminator_moves_from_its_start_on_and_not_before():
    state, step = started(tiny.AUTOENCODER)
    before = host(state.extra["discriminator"])
    for n in range(tiny.AUTOENCODER.adversarial.start):
        state, metrics = step(state, n)
        assert metrics["discriminator"] == metrics["generator"] == 0
        assert metrics["adversarial_weight"] == 0
    assert all(same(host(state.extra["discriminator"]), before))
    state, metrics = step(state, 2)
    assert metrics["discriminator"] > 0 and metrics["adversarial_weight"] > 0
    after = host(state.extra["discriminator"])
    assert not any(same(kernels(after["params"]), kernels(before["params"])))
    assert not any(same(after["statistics"], before["statistics"]))


def kernels(params):
    return [layer["kernel"] for layer in params.values()]


CODES = dataclasses.replace(
    tiny.AUTOENCODER,
    batch_size=64,
    images=images.ImagesConfig(source="photographs", resolution=8),
    model=dataclasses.replace(
        tiny.AUTOENCODER.model,
        latent="vq",
        quantizer=quantizer.QuantizerConfig(codebook_size=32, average_decay=0.8, restart_below=4.0),
    ),
    adversarial=adversarial.AdversarialConfig(),
    optim=optim.OptimConfig(lr=1e-3),
)


def test_codes_come_into_use_on_real_photographs():
    """From one code or two at the start to a perplexity above half of the codebook."""
    state, step = started(CODES)
    perplexity = []
    for n in range(40):
        state, metrics = step(state, n)
        perplexity.append(float(metrics["perplexity"]))
    assert perplexity[0] < 4
    assert np.mean(perplexity[-20:]) > 16
