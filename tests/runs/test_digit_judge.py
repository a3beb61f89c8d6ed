"""Samples of the digits by a classifier: what its figures are of, and their yardsticks."""

import dataclasses
import functools

import numpy as np
import pytest

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval import digits, frechet
from ldm_jax.eval.frechet import Moments
from ldm_jax.runs import digit_judge as digit_evaluation
from ldm_jax.runs.digit_judge import all_images, open_judge, sample_figures
from ldm_jax.runs.first_stage import FirstStage
from tests import tiny

STAGE = FirstStage(tiny.AUTOENCODER, {}, 3, "hash")


def darker(stage, pictures, mesh):
    return pictures // 2


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """(judge, file of its classifier) after a few steps."""
    path = tmp_path_factory.mktemp("judge") / "classifier.npz"
    with pytest.MonkeyPatch.context() as patch:
        short = functools.partial(digits.train_classifier, num_steps=2)
        patch.setattr(digits, "train_classifier", short)
        patch.setattr(digit_evaluation, "reconstruct", darker)
        return open_judge(STAGE, None, path), path


@pytest.fixture(scope="module")
def real():
    """Both splits: images and labels."""
    parts = [
        all_images(open_images(tiny.AUTOENCODER.images, name, augment=False))
        for name in ("train", "held_out")
    ]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def test_figures_are_those_of_all_real_digits(judge, real):
    pictures, labels = real
    figures = sample_figures(judge[0], pictures, labels)
    assert len(pictures) == 1797 == figures["num_samples"]
    assert figures["frechet_samples"] == pytest.approx(0, abs=1e-6)
    # Of all of them, where the judge is asked about those that it was not trained on.
    held_out = slice(179, None)
    features = digits.features(judge[0].classifier, pictures)
    assert judge[0].real.count == len(pictures)
    want = digits.evaluate(judge[0].classifier, pictures[held_out], labels[held_out])
    assert figures["classifier_held_out_accuracy"] == pytest.approx(want)
    dark = digits.features(judge[0].classifier, darker(None, pictures, None))
    alone = frechet.distance(Moments.of(dark), Moments.of(features))
    assert figures["frechet_autoencoder_alone"] == pytest.approx(alone, rel=1e-6) and alone > 0
    assert figures["frechet_halves_of_real"] > figures["frechet_halves_of_real_std"] > 0


def test_samples_are_held_against_what_was_asked_of_them(judge, real):
    pictures, _ = (x[:60] for x in real)
    asked = [np.full(60, c) for c in range(10)]
    figures = [sample_figures(judge[0], pictures, labels) for labels in asked]
    accuracies = [f["sample_accuracy"] for f in figures]
    want = [digits.evaluate(judge[0].classifier, pictures, labels) for labels in asked]
    assert accuracies == pytest.approx(want) and sum(accuracies) == pytest.approx(1)
    assert len({f["frechet_samples"] for f in figures}) == 1 and figures[0]["frechet_samples"] > 0


def test_a_classifier_is_trained_once(judge, monkeypatch):
    monkeypatch.setattr(digit_evaluation, "reconstruct", darker)
    monkeypatch.setattr(digits, "train_classifier", None)
    again = open_judge(STAGE, None, judge[1])
    np.testing.assert_array_equal(again.real.total, judge[0].real.total)


def test_other_images_are_refused(tmp_path):
    images = dataclasses.replace(tiny.AUTOENCODER.images, source="folder")
    run = dataclasses.replace(tiny.AUTOENCODER, images=images)
    with pytest.raises(InputError, match="trained on 'folder', and the classifier knows"):
        open_judge(dataclasses.replace(STAGE, run=run), None, tmp_path / "classifier.npz")
