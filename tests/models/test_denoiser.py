"""Conditioner and backbone together: the published sizes, and what a condition does."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import conditioners, denoiser
from ldm_jax.runs.config_files import load_run
from ldm_jax.runs.settings import DenoiserRun
from tests import tiny
from tests.models.test_autoencoder import variants
from tests.models.test_layers import normal, random_parameters
from tests.models.test_unet import published_count

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = tiny.DENOISER.model

# name: (backbone, conditioner)
PUBLISHED = {
    "imagenet-ldm4": (400_920_579, 1001 * 512),
    "celebahq-ldm4": (274_056_163, 0),
}


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", variants("denoiser.py"))
def test_every_preset_has_the_parameters_of_the_published_architecture(name):
    model = load_run(DenoiserRun, f"{CONFIGS}/denoiser.py:{name}", []).model
    shapes = jax.eval_shape(lambda: denoiser.init(model, jax.random.key(0)))
    backbone, conditioner = count(shapes["backbone"]), count(shapes["conditioner"])
    assert backbone == published_count(model.backbone, model.context_dim)
    if name in PUBLISHED:
        assert (backbone, conditioner) == PUBLISHED[name]


def test_imagenet_model_with_its_class_embedder_has_401_433_091_parameters():
    assert sum(PUBLISHED["imagenet-ldm4"]) == 401_433_091


apply = jax.jit(denoiser.apply, static_argnums=0)
Z_T, T = normal(3, 4, 4, 2), np.array([5, 5, 900])


@pytest.fixture(scope="module")
def params():
    return random_parameters(jax.eval_shape(lambda: denoiser.init(CONFIG, jax.random.key(0))))


def test_axes_name_every_dimension(params):
    axes = denoiser.axes(CONFIG)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), params, axes)


def predict(params, labels):
    return np.asarray(apply(CONFIG, params, Z_T, T, {"label": jnp.asarray(labels, jnp.int32)}))


def test_class_reaches_the_prediction_of_its_own_row_only(params):
    y, other = predict(params, [1, 2, 3]), predict(params, [1, 7, 3])
    assert np.abs(other[1] - y[1]).max() > 1e-2
    np.testing.assert_allclose(other[[0, 2]], y[[0, 2]], atol=1e-5)


def test_dropped_condition_is_the_null_condition_and_a_kept_one_stays(params):
    cond = {"label": jnp.array([1, 2, 3], jnp.int32)}
    dropped = denoiser.drop_condition(CONFIG, cond, jnp.array([True, False, True]))
    np.testing.assert_array_equal(dropped["label"], [10, 2, 10])
    null = conditioners.null(CONFIG.conditioner, 3)
    y, nothing = predict(params, dropped["label"]), predict(params, null["label"])
    np.testing.assert_allclose(y[[0, 2]], nothing[[0, 2]], atol=1e-5)
    assert np.abs(y[1] - nothing[1]).max() > 1e-2


def test_dropping_a_condition_of_any_rank_drops_whole_rows(monkeypatch):
    null = {"tokens": jnp.zeros((3, 4, 2))}
    monkeypatch.setattr(conditioners, "null", lambda config, batch_size: null)
    cond = {"tokens": jnp.ones((3, 4, 2))}
    dropped = denoiser.drop_condition(CONFIG, cond, jnp.array([False, True, False]))
    np.testing.assert_array_equal(dropped["tokens"].mean((1, 2)), [1, 0, 1])


def test_condition_names_are_what_a_batch_must_hold():
    assert denoiser.condition_names(CONFIG) == ("label",)
    assert denoiser.condition_names(denoiser.DenoiserConfig()) == ()


def test_model_without_a_condition_has_no_cross_attention_and_needs_none():
    config = dataclasses.replace(CONFIG, conditioner=conditioners.ConditionerConfig())
    assert (config.context_dim, CONFIG.context_dim) == (0, 8)
    shapes = jax.eval_shape(lambda: denoiser.init(config, jax.random.key(0)))
    assert shapes["conditioner"] == {}
    assert "qkv" in shapes["backbone"]["mid_attention"]
    assert denoiser.drop_condition(config, {}, jnp.array([True])) == {}
    y = jax.eval_shape(lambda p: denoiser.apply(config, p, Z_T, jnp.asarray(T), {}), shapes)
    assert y.shape == Z_T.shape and y.dtype == jnp.float32


def test_conditioner_and_backbone_start_from_different_keys():
    declared = jax.eval_shape(lambda: denoiser.init(CONFIG, jax.random.key(0)))
    assert set(declared) == {"backbone", "conditioner"}
    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser.unet, "init", lambda c, key, d: calls.setdefault("backbone", key))
        patch.setattr(conditioners, "init", lambda c, key: calls.setdefault("conditioner", key))
        denoiser.init(CONFIG, jax.random.key(0))
    a, b = (np.asarray(jax.random.key_data(k)) for k in calls.values())
    assert not np.array_equal(a, b)
