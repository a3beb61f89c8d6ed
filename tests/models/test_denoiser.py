"""Conditions and backbone together: the published sizes, and what a condition does."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import conditions, denoiser
from ldm_jax.models.conditions import Widths
from ldm_jax.runs.build import facts_of_config, resolve_widths
from ldm_jax.runs.config_files import load_run
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from tests import tiny
from tests.models.test_autoencoder import variants
from tests.models.test_layers import normal, random_parameters
from tests.models.test_unet import published_count

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG = tiny.DENOISER.model

# name: (backbone, conditions)
PUBLISHED = {
    "imagenet-ldm4": (400_920_579, 1001 * 512),
    "celebahq-ldm4": (274_056_163, 0),
    "ffhq-ldm4": (274_056_163, 0),
}
FIRST_STAGES = {"digits": "digits", "photographs": "photographs"} | dict.fromkeys(
    PUBLISHED, "vq-f4"
)


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("name", variants("denoiser.py"))
def test_every_preset_has_the_parameters_of_the_published_architecture(name):
    begun = ["--config.init_from=somewhere"] if name.endswith("-lpl") else []
    run = load_run(DenoiserRun, f"{CONFIGS}/denoiser.py:{name}", begun)
    first = FIRST_STAGES.get(name, "kl-f4")
    stage = load_run(AutoencoderRun, f"{CONFIGS}/autoencoder.py:{first}", [])
    model = resolve_widths(run, facts_of_config(run, stage.model)).model
    shapes = jax.eval_shape(lambda: denoiser.init(model, jax.random.key(0)))
    backbone, conditioner = count(shapes["backbone"]), count(shapes["conditioner"])
    assert backbone == published_count(model.backbone, model.widths.tokens)
    if name in PUBLISHED:
        assert (backbone, conditioner) == PUBLISHED[name]
    assert run.lpl.active == bool(begun)


def test_imagenet_model_with_its_class_embedder_has_401_433_091_parameters():
    assert sum(PUBLISHED["imagenet-ldm4"]) == 401_433_091


Z_T, T = normal(3, 4, 4, 2), np.array([5, 5, 900])


@pytest.fixture(scope="module")
def params():
    return random_parameters(jax.eval_shape(lambda: denoiser.init(CONFIG, jax.random.key(0))))


def test_axes_name_every_dimension(params):
    axes = denoiser.axes(CONFIG)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), params, axes)


@jax.jit
def apply(params, cond):
    return denoiser.apply(CONFIG, params, Z_T, T, cond)


def predict(params, labels):
    return np.asarray(apply(params, {"label": jnp.asarray(labels, jnp.int32)}))


def test_class_reaches_the_prediction_of_its_own_row_only(params):
    y, other = predict(params, [1, 2, 3]), predict(params, [1, 7, 3])
    assert np.abs(other[1] - y[1]).max() > 1e-2
    np.testing.assert_allclose(other[[0, 2]], y[[0, 2]], atol=1e-5)


def test_dropped_condition_is_the_null_condition_and_a_kept_one_stays(params):
    cond = {"label": jnp.array([1, 2, 3], jnp.int32)}
    dropped = conditions.drop(CONFIG.conditions, cond, jnp.array([True, False, True]))
    np.testing.assert_array_equal(dropped["label"], [10, 2, 10])
    null = conditions.unconditioned(CONFIG.conditions, cond)
    y, nothing = predict(params, dropped["label"]), predict(params, null["label"])
    np.testing.assert_allclose(y[[0, 2]], nothing[[0, 2]], atol=1e-5)
    assert np.abs(y[1] - nothing[1]).max() > 1e-2


def test_entries_are_what_a_batch_must_hold():
    assert conditions.entries(CONFIG.conditions) == {"label": jax.ShapeDtypeStruct((), jnp.int32)}
    assert conditions.entries(denoiser.DenoiserConfig().conditions) == {}


def test_model_without_a_condition_has_no_cross_attention_and_needs_none():
    config = dataclasses.replace(CONFIG, conditions={})
    assert (config.widths, CONFIG.widths) == (Widths(), Widths(tokens=8))
    shapes = jax.eval_shape(lambda: denoiser.init(config, jax.random.key(0)))
    assert shapes["conditioner"] == {}
    assert "qkv" in shapes["backbone"]["mid_attention"]
    y = jax.eval_shape(lambda p: denoiser.apply(config, p, Z_T, jnp.asarray(T), {}), shapes)
    assert y.shape == Z_T.shape and y.dtype == jnp.float32


def test_conditions_and_backbone_start_from_different_keys():
    declared = jax.eval_shape(lambda: denoiser.init(CONFIG, jax.random.key(0)))
    assert set(declared) == {"backbone", "conditioner"}
    calls = {}

    def record(name):
        return lambda config, key, *rest: calls.setdefault(name, key)

    with pytest.MonkeyPatch.context() as patch:
        row = denoiser.BACKBONES["unet"]._replace(init=record("backbone"))
        patch.setitem(denoiser.BACKBONES, "unet", row)
        patch.setattr(conditions, "init", record("conditions"))
        denoiser.init(CONFIG, jax.random.key(0))
    assert set(calls) == {"backbone", "conditions"}
    a, b = (np.asarray(jax.random.key_data(k)) for k in calls.values())
    assert not np.array_equal(a, b)


def test_conditions_of_different_widths_are_refused_before_anything_is_made():
    wide = conditions.ClassCondition(num_classes=3, context_dim=9)
    with pytest.raises(InputError, match="tokens of different widths"):
        dataclasses.replace(CONFIG, conditions={**CONFIG.conditions, "more": wide})


SMALL = {"unet": CONFIG.backbone}


@pytest.mark.parametrize("kind", denoiser.BACKBONES)
def test_every_backbone_predicts_in_its_own_channels_whatever_it_is_told(kind):
    row, config = denoiser.BACKBONES[kind], SMALL[kind]
    assert isinstance(config, row.config)
    widths = Widths(vector=4 * config.width, tokens=6, maps=2)
    params = jax.eval_shape(lambda: row.init(config, jax.random.key(0), widths))
    axes = row.axes(config, widths)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), params, axes)
    names = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(params) for key in path}
    assert set(row.edges) <= names
    z_t = jnp.zeros((1, 16, 16, config.in_channels))
    signals = conditions.Signals(
        jnp.zeros((1, widths.vector)), jnp.zeros((1, 3, 6)), jnp.zeros((1, 16, 16, 2))
    )
    y = jax.eval_shape(lambda p: row.apply(config, p, z_t, jnp.zeros(1), signals), params)
    assert y.shape == (1, 16, 16, config.out_channels) and y.dtype == jnp.float32
