import jax
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import random_conv


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


def test_rows_do_not_depend_on_the_batches_they_come_in(params, monkeypatch):
    images = pictures(11)
    whole = random_conv.features(params, images)
    monkeypatch.setattr(random_conv, "BATCH", 4)
    assert whole.shape == (11, random_conv.DIM) and whole.dtype == np.float32
    np.testing.assert_allclose(random_conv.features(params, images), whole, atol=1e-5)


def test_features_see_the_quarter_that_changes(params):
    images = np.repeat(pictures(1, side=32), 2, 0)
    images[1, 20:, :12] //= 2  # low and left: the third quarter, not near another
    a, b = random_conv.features(params, images).reshape(2, 4, -1)
    changed = np.abs(a - b).max(1)
    assert changed[2] > 1e-3 and changed[[0, 1, 3]].max() < 1e-6


def test_bad_images_are_refused(params):
    with pytest.raises(InputError, match="uint8"):
        random_conv.features(params, pictures(2) / 255.0)
    with pytest.raises(InputError, match="at least 8 pixels"):
        random_conv.features(params, pictures(2, side=7))
    with pytest.raises(InputError, match="at least one"):
        random_conv.features(params, pictures(0))
