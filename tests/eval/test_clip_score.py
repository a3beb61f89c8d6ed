import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.clip_score import clip_cosine, clip_score

ANGLES = np.radians([0, 60, 90, 120, 180])
IMAGES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1) * np.arange(1, 6)[:, None]
TEXTS = np.tile([[2.0, 0.0]], (5, 1))


def test_scores_are_the_closed_form_of_the_angle():
    np.testing.assert_allclose(clip_cosine(IMAGES, TEXTS), [100, 50, 0, -50, -100], atol=1e-12)
    np.testing.assert_allclose(clip_score(IMAGES, TEXTS), [2.5, 1.25, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(clip_score(IMAGES, TEXTS, weight=1.0)[:2], [1, 0.5], atol=1e-12)


def test_scores_belong_to_the_pairs():
    images, texts = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
    rows = [3, 1, 6, 0, 2, 5, 4]
    np.testing.assert_array_equal(
        clip_cosine(images[rows], texts[rows]), clip_cosine(images, texts)[rows]
    )


def test_bad_embeddings_are_refused():
    with pytest.raises(InputError, match="one text per image"):
        clip_score(IMAGES, TEXTS[:3])
    with pytest.raises(InputError, match="values differ"):
        clip_score(IMAGES, np.ones((5, 3)))
    with pytest.raises(InputError, match="no direction"):
        clip_score(IMAGES, 0 * TEXTS)
    with pytest.raises(InputError, match="image features of 5 of 5 images are not finite"):
        clip_score(IMAGES * np.nan, TEXTS)
