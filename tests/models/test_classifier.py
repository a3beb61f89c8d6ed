import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import classifier

CONFIG = classifier.ClassifierConfig(resolution=12, num_classes=7, width=4, feature_dim=16)


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: classifier.init(CONFIG, key))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, x):
    return classifier.apply(config, params, x)


def images(n, seed=1):
    return jax.random.uniform(jax.random.key(seed), (n, 12, 12, 3), minval=-1.0)


def test_features_have_unit_root_mean_square_and_logits_read_them_linearly(params):
    logits, features = apply(CONFIG, params, images(5))
    assert logits.shape == (5, 7) and features.shape == (5, 16)
    np.testing.assert_allclose(jnp.square(features).mean(-1), 1.0, rtol=1e-3)
    head = jax.device_get(params["logits"])
    np.testing.assert_allclose(
        logits, np.asarray(features) @ head["kernel"] + head["bias"], atol=1e-5
    )


def test_row_depends_on_its_own_image_alone(params):
    x = images(5)
    one = apply(CONFIG, params, x[3:4])
    every = apply(CONFIG, params, x)
    for a, b in zip(one, every, strict=True):
        np.testing.assert_allclose(a[0], b[3], atol=1e-5)


def test_every_pixel_is_seen(params):
    slope = jax.grad(lambda x: jnp.square(apply(CONFIG, params, x)[0]).sum())(images(8))
    assert (jnp.abs(slope).max((0, 3)) > 0).all()


def test_axes_name_every_dimension_of_every_parameter(params):
    axes = classifier.axes(CONFIG)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), params, axes)


def test_kernels_start_with_the_variance_that_relu_preserves():
    # Of the default size, where the sums are long enough to tell.
    config = classifier.ClassifierConfig()
    kernel = jax.jit(lambda key: classifier.init(config, key))(jax.random.key(0))["features"][
        "kernel"
    ]
    np.testing.assert_allclose(kernel.var() * kernel.shape[0], 2.0, rtol=0.05)
    np.testing.assert_allclose(kernel.mean(), 0.0, atol=1e-3)


def test_sizes_that_do_not_fit_are_refused(params):
    with pytest.raises(InputError, match="multiple of 4"):
        classifier.ClassifierConfig(resolution=30)
    with pytest.raises(InputError, match="resize"):
        classifier.apply(CONFIG, params, jnp.zeros((1, 16, 16, 3)))
