"""What a first stage's step moves, and when."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from ldm_jax.data import images
from ldm_jax.jobs.train_autoencoder import optimizers
from ldm_jax.models import autoencoder, discriminator, quantizer
from ldm_jax.sharding import MeshConfig, host_array, make_mesh, put_batch
from ldm_jax.train import adversarial, ema, optim
from ldm_jax.train.autoencoder_step import make_autoencoder_step, start_extra
from ldm_jax.train.state import init_state
from tests import tiny


def start(run):
    """A fresh state of a run on one device, its step, and batches of real digits."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    optimizer, of_discriminator = optimizers(run)
    state, shardings = init_state(
        lambda: autoencoder.init(run.model, jax.random.key(0)),
        autoencoder.axes(run.model),
        optimizer,
        mesh,
        with_ema=False,
        init_extra=lambda params: start_extra(run.recipe, params, of_discriminator),
        extra_axes=adversarial.axes(run.adversarial, 3),
    )
    learning_rate = optim.learning_rate(run.optim, run.num_steps)
    no_ema = ema.EmaConfig(decay=0.0)
    step = make_autoencoder_step(
        run.recipe, optimizer, of_discriminator, learning_rate, no_ema, mesh, shardings, None
    )
    source = images.open_images(run.images, "train", augment=False)

    def batch(n):
        rows = (np.arange(run.batch_size) + n * run.batch_size) % len(source)
        return put_batch({"image": source.read(rows, rows)["image"]}, mesh, run.batch_size)

    return state, step, batch


def host(tree):
    return jax.tree.map(host_array, tree)


def same(a, b):
    return [
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]


def test_discriminator_moves_from_its_start_on_and_not_before():
    state, step, batch = start(tiny.AUTOENCODER)
    before = host(state.extra["discriminator"])
    for n in range(tiny.AUTOENCODER.adversarial.start):
        state, metrics = step(state, batch(n))
        assert metrics["discriminator"] == metrics["generator"] == 0
        assert metrics["adversarial_weight"] == 0
    assert all(same(host(state.extra["discriminator"]), before))
    state, metrics = step(state, batch(2))
    assert metrics["discriminator"] > 0 and metrics["adversarial_weight"] > 0
    after = host(state.extra["discriminator"])
    assert not any(same(kernels(after["params"]), kernels(before["params"])))
    assert not any(same(after["statistics"], before["statistics"]))


def kernels(params):
    return [layer["kernel"] for layer in params.values()]


@pytest.mark.parametrize(
    "norm, loss, more",
    [("act", "vanilla", dict(lecam_weight=0.01)), ("none", "hinge", dict(gradient_penalty=0.1))],
)
def test_discriminator_learns_to_tell(norm, loss, more):
    """On one batch of images and blurred ones, whatever its norm and regulariser."""
    network = discriminator.DiscriminatorConfig(width=8, num_layers=1, norm=norm)
    config = adversarial.AdversarialConfig(
        weight=1.0, start=1, loss=loss, discriminator=network, **more
    )
    optimizer = optax.adam(3e-3)
    carried = before = adversarial.start(config, jax.random.key(0), optimizer, 3)
    x = np.random.default_rng(0).uniform(-1, 1, (8, 8, 8, 3)).astype(np.float32)
    turn = jax.jit(
        lambda carried, step: adversarial.discriminator_turn(
            config, optimizer, carried, x, x.mean((1, 2), keepdims=True) + 0 * x, step
        )
    )
    carried, _ = turn(carried, 0)
    assert all(same(carried, before))
    losses = []
    for n in range(30):
        carried, metrics = turn(carried, n + 1)
        losses.append(float(metrics["discriminator"]))
    assert losses[-1] < 0.6 * losses[0]
    assert float(metrics["logit_fake"]) < 0 < float(metrics["logit_real"])
    if more.get("lecam_weight"):
        assert carried["lecam"]["real"] > 0 > carried["lecam"]["fake"]


VQ = dataclasses.replace(
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
    state, step, batch = start(VQ)
    perplexity = []
    for n in range(40):
        state, metrics = step(state, batch(n))
        perplexity.append(float(metrics["perplexity"]))
    assert perplexity[0] < 4
    assert np.mean(perplexity[-20:]) > 16
