"""FID, KID, inception score, precision and recall against torch-fidelity's functions of features,
and density and coverage against the authors' prdc: the same numbers from the same features.
"""

import numpy as np
import pytest
import torch
from prdc import compute_prdc

from ldm_jax.eval import frechet
from ldm_jax.eval.inception_score import inception_score
from ldm_jax.eval.kernel import kid
from ldm_jax.eval.neighbours import density_coverage, precision_recall
from tests.parity.fidelity import metric_fid, metric_isc, metric_kid, metric_prc

pytestmark = pytest.mark.parity


def features(n, d=24, seed=0, shift=0.0, dtype=np.float64):
    """Correlated and of unequal spread, like a network's."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) * np.logspace(0, -2, d)
    return (np.maximum(rng.normal(size=(n, d)) @ mix, -0.5) + shift).astype(dtype)


def grid(n, d=3, seed=0, span=4):
    """Small whole numbers: many duplicates, many ties, and distances without rounding."""
    return np.random.default_rng(seed).integers(0, span, (n, d)).astype(np.float64)


def theirs(function, *arrays, **options):
    return function(*(torch.from_numpy(a) for a in arrays), **options)


# Their mean of f32 features is summed in f32; ours in f64.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-6), (np.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("n", [300, 20], ids=["full rank", "rank deficient"])
def test_fid_is_that_of_torch_fidelity(n, dtype, tolerance):
    a, b = features(n, dtype=dtype), features(250, seed=1, shift=0.1, dtype=dtype)
    statistics = [theirs(metric_fid.fid_features_to_statistics, x) for x in (a, b)]
    expected = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    found = frechet.distance(frechet.Moments.of(a), frechet.Moments.of(b))
    assert expected > 0.1 and found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-6)], ids=["f64", "f32"]
)
def test_kid_is_that_of_torch_fidelity(dtype, tolerance):
    a, b = (0.3 * x for x in (features(150), features(120, seed=1, shift=1.5)))
    a, b = a.astype(dtype), b.astype(dtype)
    options = dict(kid_subsets=10, kid_subset_size=60, verbose=False)
    expected = theirs(metric_kid.kid_features_to_metric, a, b, rng_seed=2020, **options)
    found = kid(a, b, subsets=10, subset_size=60)
    assert found[0] > 0.01 and found[1] > 1e-4
    assert found == pytest.approx(tuple(expected.values()), abs=tolerance)


def test_inception_score_is_that_of_torch_fidelity():
    # 1008 classes, splits of 30 and 31 images, some probabilities of 0 in f64.
    logits = np.random.default_rng(0).normal(size=(307, 1008)).astype(np.float32) * 9
    logits[5] *= 300
    expected = theirs(metric_isc.isc_features_to_metric, logits)
    assert inception_score(logits) == pytest.approx(tuple(expected.values()), rel=1e-9)
    by_class = logits[np.argsort(logits.argmax(1), kind="stable")]
    expected = theirs(metric_isc.isc_features_to_metric, by_class, splits=7, rng_seed=3)
    found = inception_score(by_class, splits=7, seed=3)
    assert found == pytest.approx(tuple(expected.values()), rel=1e-9)


SETS = {
    "new": (features(200), features(170, seed=1)),
    "f32": (features(200, dtype=np.float32), features(170, seed=1, dtype=np.float32)),
    "apart": (features(200), features(170, seed=1, shift=0.6)),
    "copies": (features(200), np.concatenate([features(200)[:80], features(60, seed=1)])),
    "ties": (grid(90), grid(110, seed=1) + np.array([0, 0, 1])),
    "duplicates": (np.repeat(grid(30, 4), 3, 0), np.repeat(grid(20, 4, seed=1), 5, 0)),
}


@pytest.mark.parametrize("save_cpu_ram", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_those_of_torch_fidelity(name, save_cpu_ram):
    real, fake = SETS[name]
    expected = theirs(
        metric_prc.prc_features_to_metric, fake, real, save_cpu_ram=save_cpu_ram, verbose=False
    )
    found = precision_recall(real, fake)
    assert min(found) > 0 and found[0] != found[1]
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_density_and_coverage_are_those_of_prdc(name):
    real, fake = SETS[name]
    expected = compute_prdc(real, fake, nearest_k=5)
    found = density_coverage(real, fake)
    assert min(found) > 0
    assert found == pytest.approx((expected["density"], expected["coverage"]), abs=1e-6)
