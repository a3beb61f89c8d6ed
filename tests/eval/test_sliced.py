import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import sliced
from ldm_jax.eval.sliced import mind, sliced_distance


def features(n, d=6, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def test_distance_of_a_shift_is_its_squared_length_over_the_width():
    # Along a unit direction u it is (u . shift)^2, whose mean over directions is |shift|^2 / D.
    x, shift = features(50), np.arange(6.0)
    found = sliced_distance(x, x + shift, 0, directions=4000)
    assert found == pytest.approx(shift @ shift / 6, rel=0.05)
    assert sliced_distance(x, x + 2 * shift, 0) == pytest.approx(
        4 * sliced_distance(x, x + shift, 0), rel=1e-9
    )


def test_distance_in_one_dimension_is_that_of_the_sorted_values():
    x, y = features(40, 1), 2 * features(40, 1, 1)
    expected = np.mean((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2)
    assert sliced_distance(x, y, 0, directions=3) == pytest.approx(expected, rel=1e-9)


def test_mind_is_scaled_by_three_times_the_width():
    x, y = features(30), features(30, seed=1)
    assert mind(x, y, 5) == pytest.approx(18 * sliced_distance(x, y, 5), rel=1e-12)


def test_distance_is_zero_for_equal_sets_in_any_order_and_symmetric():
    x, y = features(30), features(30, seed=1, shift=0.2)
    assert sliced_distance(x, x[::-1], 0) == pytest.approx(0, abs=1e-25)
    assert sliced_distance(x, y, 0) == pytest.approx(sliced_distance(y, x, 0), rel=1e-9)


def test_of_the_larger_set_a_random_subset_is_taken():
    x, y = features(30), np.concatenate([features(30, seed=1), features(30, seed=2, shift=9)])
    far = sliced_distance(x, y, 0)
    assert sliced_distance(x, y[:30], 0) < 1 < far < sliced_distance(x, y[30:], 0)
    assert sliced_distance(x, y, 0) == far != sliced_distance(x, y, 1)


def test_blocks_change_nothing(monkeypatch):
    x, y = features(30).astype(np.float32), features(30, seed=1).astype(np.float32)
    whole = sliced_distance(x, y, 0, directions=50)
    monkeypatch.setattr(sliced, "COLUMNS", 7)
    monkeypatch.setattr(sliced, "ROWS", 4)
    assert sliced_distance(x, y, 0, directions=50) == pytest.approx(whole, rel=1e-12)


def test_bad_sets_are_refused():
    with pytest.raises(InputError, match="values differ"):
        mind(features(5, 3), features(5, 4))
    with pytest.raises(InputError, match="at least 1"):
        sliced_distance(features(0), features(5), 0)
    with pytest.raises(InputError, match="0 directions"):
        sliced_distance(features(5), features(5), 0, directions=0)
    with pytest.raises(InputError, match="2 of 5 images are not finite"):
        sliced_distance(np.where(np.arange(5)[:, None] < 2, np.nan, features(5)), features(5), 0)
