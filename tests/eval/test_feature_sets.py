import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import feature_sets
from ldm_jax.eval.feature_sets import blocks, checked, checked_pair


def test_blocks_cover_every_row_once():
    for count, size in ((0, 3), (1, 3), (6, 3), (7, 3), (7, 100)):
        rows = [i for part in blocks(count, size) for i in range(part.start, part.stop)]
        assert rows == list(range(count))
        assert all(part.stop - part.start <= size for part in blocks(count, size))


def test_features_come_back_unchanged_and_uncopied():
    x = np.ones((4, 2), np.float32)
    assert checked(x) is x and checked(x, 4) is x
    assert checked(jnp.asarray(x)).dtype == np.float32


def test_every_bad_row_is_counted_in_any_block(monkeypatch):
    monkeypatch.setattr(feature_sets, "BLOCK", 3)
    x = np.ones((10, 2))
    x[[0, 4, 9], [0, 1, 1]] = np.nan, np.inf, -np.inf
    with pytest.raises(InputError, match="3 of 10 images are not finite"):
        checked(x)


def test_a_pair_says_which_set_is_wrong():
    with pytest.raises(InputError, match="real features of 1 images: at least 2"):
        checked_pair(np.ones((1, 2)), np.ones((3, 2)), 2, ("real", "fake"))
    with pytest.raises(InputError, match="fake features int64"):
        checked_pair(np.ones((3, 2)), np.ones((3, 2), int), names=("real", "fake"))
    with pytest.raises(InputError, match="real and fake features of 2 and 3 values differ"):
        checked_pair(np.ones((3, 2)), np.ones((3, 3)), names=("real", "fake"))
