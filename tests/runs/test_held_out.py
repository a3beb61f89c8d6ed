"""The held-out loss: each example's draws are its own, whatever the batch, the mesh, the run."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like
from ldm_jax.runs.held_out import SEED, compile_losses, make_evaluation
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.gradient import positions
from ldm_jax.train.state import TrainState
from ldm_jax.train.steps import draw_keys
from tests import tiny

X = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)


def losses(params, batch, step):
    keys = draw_keys(SEED, "noise", step, positions(batch))
    noise = normal_like(keys, batch["moments"])
    return jnp.square(params * batch["moments"] + noise).mean(1), jnp.abs(jnp.sin(noise[:, 0]))


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


def evaluated(config, state, count=len(X)):
    return make_evaluation(config, one(), Cache(count), {"moments"}, losses)(state, 7)[0]


def test_figures_are_means_over_the_examples_by_time_and_of_the_average():
    config = dataclasses.replace(tiny.DENOISER, eval_examples=100, loss_bins=3)
    params, ema = jnp.float32(0.5), jnp.float32(1.5)
    figures = evaluated(config, TrainState(jnp.int32(7), params, ema, {}))
    value, times = compile_losses(losses, {"moments": X}, np.arange(len(X)), one(1), 4)(1.5)
    assert figures.keys() == {"loss", "loss_bin/0", "loss_bin/1", "loss_bin/2"}
    np.testing.assert_allclose(figures["loss"], value.mean(), rtol=1e-6)
    inside = (times * 3).astype(int) == 1
    np.testing.assert_allclose(figures["loss_bin/1"], value[inside].mean(), rtol=1e-6)
    for other in (dataclasses.replace(config, batch_size=2), dataclasses.replace(config, seed=5)):
        same = evaluated(other, TrainState(jnp.int32(9), params, ema, {}))
        np.testing.assert_allclose(list(same.values()), list(figures.values()), rtol=1e-6)
    few = evaluated(
        dataclasses.replace(config, eval_examples=5, loss_bins=0),
        TrainState(jnp.int32(7), ema, {}, {}),
    )
    assert few == {"loss": pytest.approx(value[[0, 5, 10, 15, 20]].mean(), rel=1e-6)}


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="eval_examples 0 must be at least 1"):
        dataclasses.replace(tiny.DENOISER, eval_examples=0)
    with pytest.raises(InputError, match="loss_bins -1 must be at least 0"):
        dataclasses.replace(tiny.DENOISER, loss_bins=-1)
    with pytest.raises(InputError, match=r"cache is empty; set --config\.eval_every=0"):
        make_evaluation(tiny.DENOISER, one(), Cache(0), {"moments"}, losses)
