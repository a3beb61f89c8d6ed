import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.frechet import Gaussian, Moments, distance, extrapolated, frechet_distance


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


def test_a_reference_made_once_gives_the_same_distance():
    a, b = (Moments.of(features(n, 12, seed)) for n, seed in ((60, 1), (8, 2)))
    reference = Gaussian.fitted(a)
    assert Gaussian.fitted(b).root.shape == (12, 7)  # of rank 7: eight images
    assert reference.distance(Gaussian.fitted(b)) == pytest.approx(distance(a, b), rel=1e-12)
    expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert reference.distance(Gaussian.fitted(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_points_without_spread_is_that_of_the_means():
    still = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), still, np.ones(3), still) == 3


def test_distance_grows_with_noise():
    x, reference = features(400, 6), Moments.of(features(400, 6, 1))
    noise = np.random.default_rng(2).normal(size=x.shape)
    levels = [distance(Moments.of(x + s * noise), reference) for s in (0, 0.2, 0.5, 1)]
    assert levels == sorted(levels)


def test_extrapolation_removes_the_bias_of_few_images():
    # The reference is exact, so all of the distance is bias.
    rng = np.random.default_rng(0)
    exact = Gaussian.of(np.zeros(20), np.eye(20))
    found = [
        extrapolated(rng.normal(size=(600, 20)), exact, seed, smallest=100) for seed in range(6)
    ]
    biased = np.mean([f.distances[-1] for f in found])
    assert found[0].sizes[0] == 100 and found[0].sizes[-1] == 600 and len(found[0].sizes) == 15
    assert biased > 0.1 and min(f.slope for f in found) > 0
    assert abs(np.mean([f.value for f in found])) < 0.15 * biased


def test_extrapolation_is_the_line_through_its_points_and_of_its_seed():
    x, reference = features(60, 4), Gaussian.fitted(Moments.of(features(80, 4, 1, shift=0.2)))
    found = extrapolated(x, reference, 0, smallest=20, points=5)
    design = np.stack([np.ones(5), 1 / np.array(found.sizes)], 1)
    line = np.linalg.lstsq(design, np.array(found.distances), rcond=None)[0]
    np.testing.assert_allclose([found.value, found.slope], line, rtol=1e-9)
    assert found.sizes == (20, 30, 40, 50, 60)
    whole = Gaussian.fitted(Moments.of(x)).distance(reference)
    assert found.distances[-1] == pytest.approx(whole, rel=1e-9)
    assert extrapolated(x, reference, 0, smallest=20, points=5) == found
    assert extrapolated(x, reference, 1, smallest=20, points=5).value != found.value


def test_extrapolation_refuses_too_few_images():
    reference = Gaussian.of(np.zeros(4), np.eye(4))
    with pytest.raises(InputError, match="15 sizes from 5000 to 60 images"):
        extrapolated(features(60, 4), reference, 0)
    with pytest.raises(InputError, match="values differ"):
        extrapolated(features(60, 5), reference, 0, smallest=20)
    with pytest.raises(InputError, match="not finite"):
        extrapolated(features(60, 4) * np.nan, reference, 0, smallest=20)
    with pytest.raises(InputError, match="1 sizes from 20 to 60 images"):
        extrapolated(features(60, 4), reference, 0, smallest=20, points=1)
    with pytest.raises(InputError, match="15 sizes from 47 to 60 images"):
        extrapolated(features(60, 4), reference, 0, smallest=47)
    assert extrapolated(features(60, 4), reference, 0, smallest=46).sizes == (*range(46, 61),)


def test_statistics_that_are_none_are_refused():
    with pytest.raises(InputError, match=r"finite \[D\] and \[D,D\]"):
        Gaussian.of(np.zeros(4), np.eye(3))
    with pytest.raises(InputError, match="finite"):
        Gaussian.of(np.zeros(3), np.eye(3) * np.nan)
