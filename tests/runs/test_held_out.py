"""The held-out loss: each example's draws are its own, whatever the batch, the mesh, the run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like
from ldm_jax.runs import held_out
from ldm_jax.runs.build import facts_of_config
from ldm_jax.runs.held_out import SEED, compile_losses
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.denoiser import Examples
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import draw_keys, positions
from tests import tiny

X = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)


def losses(params, frozen, batch, step):
    keys = draw_keys(SEED, "noise", step, positions(batch))
    x, noise = batch["moments"], normal_like(keys, batch["moments"])
    return Examples(jnp.square(params * x + noise).mean(1), jnp.abs(jnp.sin(noise[:, 0])), x, x)


class Cache:
    directory = Path("cache")

    def __init__(self, count=len(X)):
        self.count = count

    def __len__(self):
        return self.count

    def read(self, indices, positions):
        return {"moments": X[indices], "label": indices}


def one(count=8):
    return make_mesh(MeshConfig(count, 1, 1), jax.devices()[:count])


@pytest.fixture(scope="module")
def alone():
    """Every example in a batch of its own."""
    parts = [
        compile_losses(losses, {"moments": X[i : i + 1]}, np.arange(i, i + 1), one(1), 1)(1.5)
        for i in range(3)
    ]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize(("size", "devices"), [(1, 1), (4, 1), (21, 1), (8, 8), (3, 8)])
def test_loss_of_an_example_depends_on_neither_batch_nor_mesh(alone, size, devices):
    measure = compile_losses(losses, {"moments": X}, np.arange(len(X)), one(devices), size)
    for got, want in zip(measure(1.5), alone, strict=True):
        assert got.shape == (len(X),) and len(np.unique(got)) == len(X)
        np.testing.assert_allclose(got[:3], want, rtol=1e-6)


FACTS = facts_of_config(tiny.DENOISER, tiny.AUTOENCODER.model)


def evaluated(config, state, monkeypatch):
    described = []
    monkeypatch.setattr(held_out, "per_example", lambda of: described.append(of) or losses)
    hook = held_out.hook(config, FACTS, one(), Cache())
    # Draws of no run's own, and conditions that are kept.
    assert described[0].seed == SEED and described[0].loss.condition_dropout == 0
    assert hook.every == config.eval_every
    figures = hook.run(state, 7).figures
    assert tuple(figures) == hook.figures
    return figures


def test_figures_are_means_over_the_examples_by_time_and_of_the_average(monkeypatch):
    config = dataclasses.replace(tiny.DENOISER, eval_examples=100, loss_bins=3, eval_every=2)
    params, ema = jnp.float32(0.5), jnp.float32(1.5)
    averaged = TrainState(jnp.int32(7), params, {}, {"ema": ema})
    figures = evaluated(config, averaged, monkeypatch)
    value, times = compile_losses(losses, {"moments": X}, np.arange(len(X)), one(1), 4)(1.5)
    assert figures.keys() == {"loss", "loss_bin/0", "loss_bin/1", "loss_bin/2"}
    np.testing.assert_allclose(figures["loss"], value.mean(), rtol=1e-6)
    inside = (times * 3).astype(int) == 1
    np.testing.assert_allclose(figures["loss_bin/1"], value[inside].mean(), rtol=1e-6)
    for other in (dataclasses.replace(config, batch_size=2), dataclasses.replace(config, seed=5)):
        same = evaluated(other, averaged, monkeypatch)
        np.testing.assert_allclose(list(same.values()), list(figures.values()), rtol=1e-6)
    few = evaluated(
        dataclasses.replace(config, eval_examples=5, loss_bins=0),
        TrainState(jnp.int32(7), ema, {}),
        monkeypatch,
    )
    assert few == {"loss": pytest.approx(value[[0, 5, 10, 15, 20]].mean(), rel=1e-6)}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="eval_examples 0 must be at least 1"):
        dataclasses.replace(tiny.DENOISER, eval_examples=0)
    with pytest.raises(InputError, match="loss_bins -1 must be at least 0"):
        dataclasses.replace(tiny.DENOISER, loss_bins=-1)
    with pytest.raises(InputError, match=r"cache is empty; set --config\.eval_every=0"):
        held_out.hook(tiny.DENOISER, FACTS, one(), Cache(0))
