import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import random_conv
from ldm_jax.models.autoencoder import to_unit


def pictures(n, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def params():
    return random_conv.init(0)


def test_features_are_a_function_of_the_seed(params):
    again, other = random_conv.init(0), random_conv.init(1)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert not np.array_equal(params["conv1"], other["conv1"])


def test_kernels_keep_the_variance_of_a_rectified_signal(params):
    for kernel in params.values():
        fan_in = np.prod(kernel.shape[:-1])
        assert np.var(kernel) == pytest.approx(2 / fan_in, rel=0.2)


def features(params, images):
    return np.asarray(random_conv.apply(params, to_unit(images)))


def test_rows_do_not_depend_on_the_batches_they_come_in(params):
    images = pictures(5)
    whole = features(params, images)
    assert whole.shape == (5, random_conv.DIM) and whole.dtype == np.float32
    parts = [features(params, part) for part in (images[:2], images[2:])]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


def test_features_see_the_quarter_that_changes(params):
    images = np.repeat(pictures(1, side=32), 2, 0)
    images[1, 20:, :12] //= 2  # low and left: the third quarter, not near another
    a, b = features(params, images).reshape(2, 4, -1)
    changed = np.abs(a - b).max(1)
    assert changed[2] > 1e-3 and changed[[0, 1, 3]].max() < 1e-6


def test_bad_images_are_refused(params):
    with pytest.raises(InputError, match="at least 8 pixels"):
        features(params, pictures(2, side=7))
