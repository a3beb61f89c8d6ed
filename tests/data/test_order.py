import numpy as np
import pytest

from ldm_jax.data.order import Order
from ldm_jax.errors import InputError

SHAPES = [(10, 1, 64), (103, 8, 3), (103, 8, 64), (96, 8, 3), (7, 32, 2), (103, 8, 1), (97, 4, 2)]


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_is_a_permutation_in_each_epoch(n, block, window):
    order = Order(n, 5, block, window)
    for epoch in range(4):
        got = order.examples(np.arange(epoch * n, (epoch + 1) * n))
        np.testing.assert_array_equal(np.sort(got), np.arange(n))


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_differs_by_epoch_and_by_seed(n, block, window):
    first, second = Order(n, 5, block, window).examples(np.arange(2 * n)).reshape(2, n)
    assert not np.array_equal(first, second)
    other = Order(n, 6, block, window).examples(np.arange(n))
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("n", "block", "window"), SHAPES)
def test_order_is_a_function_of_each_position_alone(n, block, window):
    order = Order(n, 5, block, window)
    whole = order.examples(np.arange(3 * n))
    asked = np.random.default_rng(0).permutation(3 * n)[:20]
    np.testing.assert_array_equal(order.examples(asked), whole[asked])


def test_order_stays_inside_windows_of_records_when_examples_are_packed():
    n, block, window = 1000, 8, 4
    got = Order(n, 5, block, window).examples(np.arange(n))
    for start in range(0, n - window * block, window * block):
        # The last record (125 of them, none short) may stand anywhere.
        assert len(np.unique(got[start : start + window * block] // block)) == window


def test_order_shuffles_inside_windows_when_examples_are_packed():
    got = Order(1024, 5, 32, 8).examples(np.arange(1024))
    neighbours = np.mean(np.diff(got) == 1)
    assert neighbours < 0.02
    records = got.reshape(4, 256) // 32
    assert not np.array_equal(np.unique(records[0]), np.arange(8))  # records are permuted as well


def test_order_keeps_its_first_places_across_versions():
    # A change here changes the data order of every run that resumes.
    assert Order(10, 0).examples(np.arange(10)).tolist() == [8, 7, 4, 6, 3, 5, 0, 2, 9, 1]
    packed = Order(21, 0, 4, 2).examples(np.arange(8)).tolist()
    assert packed == [18, 19, 13, 14, 17, 16, 12, 15]


def test_order_refuses_an_empty_data_set():
    with pytest.raises(InputError, match=r"num_examples 0"):
        Order(0, 0)
