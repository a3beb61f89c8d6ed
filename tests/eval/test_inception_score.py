import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import inception_score as module
from ldm_jax.eval.inception_score import inception_score, inception_score_adm


def logits(n, classes=10, seed=0, sharpness=3.0):
    return (sharpness * np.random.default_rng(seed).normal(size=(n, classes))).astype(np.float32)


def test_score_is_its_definition_per_consecutive_split():
    x = logits(25).astype(np.float64)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    scores = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:10], p[10:20], p[20:])]
    found = inception_score_adm(x, split_size=10)
    np.testing.assert_allclose(found, (np.mean(scores), np.std(scores)), rtol=1e-12)


def test_splits_of_the_shuffled_score_are_of_almost_equal_size():
    # One certain class per image: with n images of n classes in a split, its score is n.
    x = 1e4 * np.eye(23)
    mean, _ = inception_score(x, splits=5)
    sizes = np.diff([i * 23 // 5 for i in range(6)])
    assert mean == pytest.approx(sizes.mean(), rel=1e-9)
    assert inception_score(x, splits=5)[1] == pytest.approx(sizes.std(), rel=1e-9)


def test_score_is_between_one_and_the_number_of_classes():
    assert inception_score(np.zeros((40, 7)), splits=4) == (pytest.approx(1), pytest.approx(0))
    sure = 1e4 * np.eye(7)[np.arange(70) % 7]
    assert inception_score_adm(sure)[0] == pytest.approx(7)


def test_score_grows_as_predictions_sharpen():
    scores = [inception_score(logits(200, sharpness=s))[0] for s in (0.5, 1, 3, 9)]
    assert scores == sorted(scores)


def test_order_by_class_matters_to_the_unshuffled_convention_alone():
    labels = np.arange(1000) % 10
    mixed = 5 * np.eye(10)[labels] + logits(1000, sharpness=0.5)
    by_class = mixed[np.argsort(labels, kind="stable")]
    shuffled, trap = inception_score(by_class)[0], inception_score_adm(by_class, split_size=100)[0]
    assert shuffled == pytest.approx(inception_score(mixed)[0], rel=0.02)
    assert shuffled > 5 and trap < 1.1


def test_a_constant_added_to_the_logits_changes_nothing_even_a_large_one():
    x = logits(50).astype(np.float64)
    assert inception_score(x + 1e4)[0] == pytest.approx(inception_score(x)[0], rel=1e-8)


def test_blocks_change_nothing(monkeypatch):
    whole = inception_score(logits(90), splits=2)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert inception_score(logits(90), splits=2) == pytest.approx(whole, rel=1e-12)


def test_bad_logits_are_refused():
    with pytest.raises(InputError, match="10 splits of 9 images"):
        inception_score(logits(9))
    with pytest.raises(InputError, match="0 splits"):
        inception_score(logits(9), splits=0)
    with pytest.raises(InputError, match="at least 1"):
        inception_score_adm(logits(0))
    with pytest.raises(InputError, match="9 of 9 images are not finite"):
        inception_score_adm(logits(9) * np.inf)
