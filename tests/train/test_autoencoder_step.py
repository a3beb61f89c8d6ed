"""What a first stage's step moves, and when."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_jax.data import images
from ldm_jax.jobs.train_autoencoder import optimizers
from ldm_jax.models import autoencoder, discriminator, quantizer
from ldm_jax.sharding import MeshConfig, host_array, make_mesh, put_batch
from ldm_jax.train import adversarial, optim
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
    no_ema = dataclasses.replace(run.ema, decay=0.0)
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


LAST_TWO = dict(lecam_weight=0.01, gradient_penalty=0.1)


@pytest.mark.parametrize(
    "norm, more", [("batch", {}), ("act", LAST_TWO)], ids=["batch norm", "act norm, LeCam, R1"]
)
def test_discriminator_moves_from_its_start_on_and_not_before(norm, more):
    network = discriminator.Config(width=8, num_layers=1, norm=norm)
    adversary = adversarial.Config(weight=0.5, start=2, discriminator=network, **more)
    state, step, batch = start(dataclasses.replace(tiny.AUTOENCODER, adversarial=adversary))
    before = host(state.extra)
    for n in range(2):
        state, metrics = step(state, batch(n))
        assert metrics["discriminator"] == metrics["generator"] == 0
        assert metrics["adversarial_weight"] == 0
    assert all(same(host(state.extra), before))
    state, metrics = step(state, batch(2))
    assert metrics["discriminator"] > 0 and metrics["adversarial_weight"] > 0
    after = host(state.extra["discriminator"])
    assert not any(same(after["params"], before["discriminator"]["params"]))
    if norm == "batch":
        statistics = after["statistics"], before["discriminator"]["statistics"]
        assert not any(same(*statistics))
    if more:
        assert not any(same(after["lecam"], before["discriminator"]["lecam"]))
    # The discriminator learns to tell: its own loss on the same batch falls.
    losses = []
    for _ in range(6):
        state, metrics = step(state, batch(2))
        losses.append(float(metrics["discriminator"]))
    assert losses[-1] < losses[0]


def test_training_the_decoder_alone_leaves_the_encoder_even_under_weight_decay():
    run = dataclasses.replace(
        tiny.AUTOENCODER,
        train="decoder",
        adversarial=adversarial.Config(),
        optim=optim.Config(lr=1e-2, weight_decay=0.1),
    )
    state, step, batch = start(run)
    before = host(state.params)
    state, _ = step(state, batch(0))
    after = host(state.params)
    assert all(same(after["encoder"], before["encoder"]))
    assert not any(same(after["decoder"], before["decoder"]))


VQ = dataclasses.replace(
    tiny.AUTOENCODER,
    batch_size=64,
    model=dataclasses.replace(
        tiny.AUTOENCODER.model,
        latent="vq",
        quantizer=quantizer.Config(codebook_size=32, average_decay=0.9, restart_below=0.5),
    ),
    adversarial=adversarial.Config(),
    optim=optim.Config(lr=3e-3),
)


def test_codes_come_into_use_on_real_digits():
    """Upkeep brings the perplexity above half of the codebook; plain gradients leave it behind."""
    perplexity = {}
    for name, settings in (
        ("upkeep", VQ.model.quantizer),
        ("gradient", quantizer.Config(codebook_size=32)),
    ):
        model = dataclasses.replace(VQ.model, quantizer=settings)
        state, step, batch = start(dataclasses.replace(VQ, model=model))
        seen = []
        for n in range(60):
            state, metrics = step(state, batch(n))
            seen.append(float(metrics["perplexity"]))
        perplexity[name] = seen
    assert perplexity["upkeep"][0] < 16 < np.mean(perplexity["upkeep"][-5:])
    assert np.mean(perplexity["upkeep"][-5:]) > np.mean(perplexity["gradient"][-5:])
