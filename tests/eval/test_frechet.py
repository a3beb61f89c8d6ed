import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.frechet import Moments, distance, frechet_distance


def features(n, d, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) * np.logspace(0, -3, d)
    return rng.normal(size=(n, d)) @ mix + shift


def rotation(d):
    return np.linalg.qr(np.random.default_rng(5).normal(size=(d, d)))[0]


@pytest.mark.parametrize("n", [200, 10], ids=["full rank", "rank deficient"])
def test_distance_of_a_set_to_itself_is_zero(n):
    m = Moments.of(features(n, 32))
    assert distance(m, m) < 1e-10


def test_distance_is_the_shift_when_covariances_are_equal():
    c = np.cov(features(100, 8), rowvar=False)
    shift = np.arange(8.0)
    assert frechet_distance(np.zeros(8), c, shift, c) == pytest.approx(shift @ shift, rel=1e-10)


def test_distance_is_the_closed_form_when_covariances_commute():
    # In a shared eigenbasis: sum of (sqrt(a) - sqrt(b))^2, some of them zero.
    q, a, b = rotation(6), np.array([4, 1, 9, 0, 0.25, 0]), np.array([1, 1, 0, 4, 2.25, 0])
    found = frechet_distance(np.zeros(6), q * a @ q.T, np.zeros(6), q * b @ q.T)
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-10)


def test_distance_is_the_closed_form_when_covariances_do_not_commute():
    # In two dimensions tr (C1 C2)^(1/2) = sqrt(tr(C1 C2) + 2 sqrt(det(C1 C2))).
    c1, c2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.6], [-0.6, 3.0]])
    product = c1 @ c2
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(c1) + np.trace(c2) - 2 * cross
    found = frechet_distance(np.zeros(2), c1, np.zeros(2), c2)
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_is_exact_when_covariances_are_orthogonal_and_of_rank_one():
    # C1 C2 = 0: nothing is shared, so the traces remain; eigenvalues of the product would blur.
    q = rotation(16)
    c1, c2 = np.outer(q[0], q[0]), 1e6 * np.outer(q[1], q[1])
    found = frechet_distance(np.zeros(16), c1, np.zeros(16), c2)
    assert found == pytest.approx(1 + 1e6, rel=1e-13)


def test_distance_is_symmetric_and_invariant_under_rotation():
    a, b, q = features(60, 12, 1), features(90, 12, 2, shift=0.3), rotation(12)
    plain = distance(Moments.of(a), Moments.of(b))
    assert plain > 0.1
    assert distance(Moments.of(b), Moments.of(a)) == pytest.approx(plain, rel=1e-9)
    assert distance(Moments.of(a @ q), Moments.of(b @ q)) == pytest.approx(plain, rel=1e-9)


def test_distance_scales_with_the_square_of_the_features():
    a, b = features(60, 6, 1), features(60, 6, 2)
    plain = distance(Moments.of(a), Moments.of(b))
    assert distance(Moments.of(3 * a), Moments.of(3 * b)) == pytest.approx(9 * plain, rel=1e-9)


def test_moments_are_those_of_numpy():
    x = features(50, 7, shift=2.0).astype(np.float32)
    m = Moments.of(x)
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(m.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-12)


def test_moments_of_parts_merge_to_those_of_the_whole():
    x = features(50, 7)
    parts = Moments.of(x[:20]).merge(Moments.empty(7).add(x[20:21]).add(x[21:]))
    whole = Moments.of(x)
    assert parts.count == whole.count == 50
    np.testing.assert_allclose(parts.total, whole.total, atol=1e-12)
    np.testing.assert_allclose(parts.outer, whole.outer, atol=1e-12)


def test_adding_leaves_the_old_moments_as_they_were():
    m = Moments.of(features(5, 3))
    before = m.outer.copy()
    m.add(features(5, 3, 1))
    assert m.count == 5
    np.testing.assert_array_equal(m.outer, before)


def test_bad_features_are_refused():
    broken = features(5, 3)
    broken[2, 1] = np.nan
    with pytest.raises(InputError, match="1 of 5 images are not finite"):
        Moments.of(broken)
    with pytest.raises(InputError, match=r"\[N, 4\]"):
        Moments.empty(4).add(features(5, 3))
    with pytest.raises(InputError, match="at least 2"):
        distance(Moments.of(features(1, 3)), Moments.of(features(5, 3)))
    with pytest.raises(InputError, match="differ"):
        distance(Moments.of(features(5, 4)), Moments.of(features(5, 3)))
