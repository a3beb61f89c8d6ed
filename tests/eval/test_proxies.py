"""Measures that need no pretrained network, on digits: together they see every fault listed here.

Three thirds of the real digits: the reference, the floor (what a perfect sampler of as many images
would score) and the held-out third that the faults are applied to.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from ldm_jax.eval import digits, neighbours, random_conv
from ldm_jax.eval.frechet import Gaussian, Moments
from ldm_jax.models import classifier

N = 599  # images in every set: figures of unequal sizes do not compare
FACTOR = 2.0  # a distance is caught above this multiple of the floor
MARGIN = 0.15  # precision, recall, density and coverage are caught this far below the floor
DISTANCES = ("pixel FD", "classifier FD", "random-conv FD")


@dataclasses.dataclass(frozen=True)
class Reference:
    features: Callable  # images -> (pixels, classifier, random-conv), [N,D] each
    pixels: np.ndarray  # [N,64]
    fits: list[Gaussian]  # of each kind of features

    def figures(self, images):
        pixels, *others = self.features(images)
        fits = [Gaussian.fitted(Moments.of(x)) for x in (pixels, *others)]
        found = [a.distance(b) for a, b in zip(self.fits, fits, strict=True)]
        found += neighbours.precision_recall(self.pixels, pixels)
        found += neighbours.density_coverage(self.pixels, pixels)
        names = (*DISTANCES, "precision", "recall", "density", "coverage")
        return dict(zip(names, found, strict=True))


@dataclasses.dataclass(frozen=True)
class Bench:
    reference: Reference
    training: np.ndarray  # the images of the reference, f32 [N,8,8] in [0,1] like all here
    held_out: np.ndarray
    labels: np.ndarray  # of the held-out ones
    floor: dict
    found: dict = dataclasses.field(default_factory=dict)  # figures of each fault so far

    def figures(self, name):
        if name not in self.found:
            self.found[name] = self.reference.figures(FAULTS[name](self))
        return self.found[name]

    def caught_by(self, name):
        """The measures that tell the images with the fault `name` from real ones."""
        found = self.figures(name)
        return {
            key
            for key, floor in self.floor.items()
            if (found[key] > FACTOR * floor if key in DISTANCES else found[key] < floor - MARGIN)
        }


@pytest.fixture(scope="module")
def bench():
    data = load_digits()
    order = np.random.default_rng(0).permutation(3 * N)
    thirds = order.reshape(3, N)
    images = data.images.astype(np.float32) / 16
    colour = np.repeat(np.round(255 * images[..., None]).astype(np.uint8), 3, -1)
    judge = digits.train_classifier(
        colour[thirds[0]], data.target[thirds[0]], 0, num_steps=120, batch_size=64, max_shift=0
    )
    kernels = random_conv.init(0)

    @jax.jit
    def networks(x):
        return classifier.apply(judge.config, judge.params, x)[1], random_conv.apply(kernels, x)

    def features(images):
        x = np.repeat(2 * images[..., None] - 1, 3, -1).astype(np.float32)
        return images.reshape(len(images), -1), *(np.asarray(f) for f in networks(x))

    training, other, held_out = (images[third] for third in thirds)
    sets = features(training)
    reference = Reference(features, sets[0], [Gaussian.fitted(Moments.of(x)) for x in sets])
    floor = reference.figures(other)
    return Bench(reference, training, held_out, data.target[thirds[2]], floor)


def matched_gaussian(bench):
    pixels = bench.training.reshape(N, -1)
    rng = np.random.default_rng(1)
    draws = rng.multivariate_normal(pixels.mean(0), np.cov(pixels, rowvar=False), N)
    return draws.reshape(N, 8, 8).astype(np.float32)


def independent_pixels(bench):
    pixels = bench.held_out.reshape(N, -1)
    return np.random.default_rng(1).permuted(pixels, axis=0).reshape(N, 8, 8)


def noisy(images, scale):
    noise = np.random.default_rng(1).normal(0, scale, (N, 8, 8))
    return (images + noise).astype(np.float32)


FAULTS = {
    "none": lambda b: b.held_out,
    "copies": lambda b: b.training,
    "uniform noise": lambda b: np.random.default_rng(1).uniform(size=(N, 8, 8)).astype("f4"),
    "matched Gaussian": matched_gaussian,
    "independent pixels": independent_pixels,
    "blur": lambda b: ndimage.gaussian_filter(b.held_out, (0, 0.7, 0.7)),
    "noise 0.1": lambda b: noisy(b.held_out, 0.1),
    "noise 0.2": lambda b: noisy(b.held_out, 0.2),
    "noise 0.4": lambda b: noisy(b.held_out, 0.4),
    "half the classes": lambda b: np.resize(b.held_out[b.labels < 5], (N, 8, 8)),
    "100 images": lambda b: np.resize(b.held_out[:100], (N, 8, 8)),
    "10 images": lambda b: np.resize(b.held_out[:10], (N, 8, 8)),
    "shifted by a pixel": lambda b: np.roll(b.held_out, 1, 2),
    "transposed": lambda b: b.held_out.transpose(0, 2, 1),
}


def test_real_images_are_caught_by_none(bench):
    assert bench.caught_by("none") == set()


@pytest.mark.parametrize("fault", list(FAULTS)[2:])
def test_a_fault_is_caught(bench, fault):
    assert bench.caught_by(fault)


def test_moments_of_pixels_are_blind_to_a_gaussian_that_shares_them(bench):
    caught = bench.caught_by("matched Gaussian")
    assert "pixel FD" not in caught and {"classifier FD", "precision", "coverage"} <= caught


def test_a_classifier_is_blind_to_noise_that_it_sees_through(bench):
    caught = bench.caught_by("noise 0.1")
    assert "classifier FD" not in caught and {"pixel FD", "density"} <= caught


def test_precision_is_blind_to_missing_classes_and_to_repetition(bench):
    for fault in ("half the classes", "10 images"):
        caught = bench.caught_by(fault)
        assert "precision" not in caught and {"recall", "coverage", "classifier FD"} <= caught


def test_only_the_nearest_neighbours_give_copies_of_the_training_set_away(bench):
    assert bench.caught_by("copies") == set()

    def copied(images):
        pixels = images.reshape(N, -1)
        return neighbours.memorisation(pixels, bench.reference.pixels).copied

    assert copied(bench.held_out) < 0.01
    assert copied(bench.training) == 1
    assert copied(noisy(bench.training, 0.01)) > 0.99


@pytest.mark.parametrize("name", DISTANCES)
def test_distance_grows_with_the_noise(bench, name):
    faults = ("none", "noise 0.1", "noise 0.2", "noise 0.4")
    levels = [bench.figures(fault)[name] for fault in faults]
    assert levels == sorted(levels) and levels[0] < levels[1]
