import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.kernel import cmmd, kid, unbiased


def features(n, d=16, seed=0, shift=0.0, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=(n, d)) + shift).astype(dtype)


def by_loops(x, y):
    """The unbiased estimate, pair by pair as in the definition."""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_the_unbiased_estimate_is_its_definition():
    x, y = features(11, 4), features(7, 4, 1, shift=0.3)
    assert unbiased(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)


def test_kid_of_whole_sets_as_the_only_subset_is_that_of_all_pairs():
    x, y = features(40), features(40, seed=1)
    mean, std = kid(x, y, subsets=3, subset_size=40)
    assert mean == pytest.approx(unbiased(x, y), rel=1e-9) and std < 1e-12


def test_kid_is_unbiased_when_the_distributions_are_equal():
    # Twenty pairs of sets: the mean lies within 3 standard errors of 0, and single ones below it.
    all_pairs = [
        unbiased(features(50, seed=2 * i), features(60, seed=2 * i + 1)) for i in range(99)
    ]
    error = np.std(all_pairs) / np.sqrt(len(all_pairs))
    assert abs(np.mean(all_pairs)) < 3 * error and min(all_pairs) < 0
    # The biased estimate would lie this far off: the mean of k(x, x) over N.
    assert error < 0.1 * 8 / 50


@pytest.mark.parametrize("measure", [unbiased, cmmd, lambda x, y: kid(x, y, subset_size=50)[0]])
def test_distance_grows_with_the_shift_and_is_symmetric(measure):
    x = features(80)
    levels = [measure(x, features(80, seed=1, shift=s)) for s in (0, 0.3, 0.6, 1.2)]
    assert levels == sorted(levels) and levels[0] < levels[1]
    if measure in (unbiased, cmmd):
        y = features(80, seed=1, shift=0.3)
        assert measure(y, x) == pytest.approx(measure(x, y), rel=1e-9)


@pytest.mark.parametrize("measure", [unbiased, cmmd])
def test_blocks_and_the_order_of_images_change_nothing(measure):
    x, y = features(37, dtype=np.float32), features(23, seed=1, shift=0.1, dtype=np.float32)
    whole = measure(x, y)
    assert abs(whole) > 1e-3
    for block in (1, 5, 23, 36):
        assert measure(x, y, block=block) == pytest.approx(whole, rel=1e-9)
    assert measure(x[::-1], np.roll(y, 3, 0), block=8) == pytest.approx(whole, rel=1e-9)


def test_distances_are_invariant_under_rotation():
    q = np.linalg.qr(features(16, 16, 5))[0]
    x, y = features(30), features(30, seed=1, shift=0.2)
    for measure in (unbiased, cmmd):
        assert measure(x @ q, y @ q) == pytest.approx(measure(x, y), rel=1e-9)


def test_subsets_are_a_function_of_the_seed_alone():
    x, y = features(60), features(60, seed=1)
    first = kid(x, y, subsets=4, subset_size=20)
    np.random.seed(3)  # noqa: NPY002  a global state that must not matter
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert kid(x, y, subsets=4, subset_size=20) == first
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert kid(x, y, subsets=4, subset_size=20, seed=1) != first
    assert first[1] > 0


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_cmmd_is_ten_times_the_squared_distance_of_the_mean_embeddings():
    x, y = features(300, 32), features(200, 32, 1, shift=0.3)
    near = 10 * np.sum((unit(x).mean(0) - unit(y).mean(0)) ** 2)
    assert near > 0.1
    assert cmmd(x, y) == pytest.approx(near, rel=1e-2)
    assert cmmd(x, y) != pytest.approx(near, rel=1e-6)


def test_cmmd_is_its_definition_and_ignores_lengths():
    x, y = features(9, 5), features(6, 5, 1)

    def k(a, b):
        return np.exp(-((unit(a)[:, None] - unit(b)[None]) ** 2).sum(-1) / 200).mean()

    expected = 1000 * (k(x, x) + k(y, y) - 2 * k(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(3 * x, y * np.arange(1, 7)[:, None]) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-12)


def test_two_images_of_either_set_are_enough_for_an_estimate():
    x, y = features(2), features(2, seed=1)
    mean, std = kid(x, y, subsets=3, subset_size=2)
    assert mean == pytest.approx(by_loops(x, y), rel=1e-12) and std < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kid(features(10), features(2000)), "1000 images from sets of 10 and 2000"),
        (lambda: kid(features(10), features(10), subset_size=1), "of 2 to 10 images"),
        (lambda: kid(features(10), features(10), subset_size=5, subsets=0), "1 subset or more"),
        (lambda: kid(features(1), features(10), subset_size=2), "of 2 to 1 images"),
        (lambda: kid(features(5, 3), features(5, 4)), "3 and 4 values differ"),
        (lambda: cmmd(features(5) * np.nan, features(5)), "5 of 5 images are not finite"),
        (lambda: cmmd(features(5) * 0, features(5)), "no direction"),
        (lambda: cmmd(features(5).astype(int), features(5)), "floating point"),
        (lambda: cmmd(features(5)[0], features(5)), r"\[N,D\]"),
        (lambda: unbiased(features(5), features(5), block=0), "blocks of 0"),
    ],
)
def test_bad_sets_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
