import jax
import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from ldm_jax.errors import InputError
from ldm_jax.eval import digits
from ldm_jax.eval.frechet import Moments, distance
from ldm_jax.models import classifier

SMALL = classifier.ClassifierConfig(resolution=12, num_classes=3, width=4, feature_dim=8)


def toy(n=60, seed=0):
    """Images of three classes that differ by their brightest corner."""
    labels = np.arange(n) % 3
    images = np.random.default_rng(seed).integers(0, 80, (n, 12, 12, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        top, left = divmod(label, 2)
        images[i, 6 * top : 6 * top + 6, 6 * left : 6 * left + 6] += 120
    return images, labels


def train(**changes):
    settings = dict(seed=0, num_steps=30, batch_size=16, max_shift=1, config=SMALL) | changes
    return digits.train_classifier(*toy(), **settings)


@pytest.fixture(scope="module")
def small():
    return train()


@pytest.fixture(scope="module")
def real():
    """(images uint8 [1797,32,32,3], labels): every real digit, enlarged bicubically."""
    data = load_digits()
    images = [
        np.asarray(Image.fromarray(np.round(i * 255 / 16).astype(np.uint8)).resize((32, 32), 3))
        for i in data.images
    ]
    return np.repeat(np.stack(images)[..., None], 3, -1), data.target


@pytest.fixture(scope="module")
def split(real):
    order = np.random.default_rng(0).permutation(len(real[0]))
    return order[:1497], order[1497:]


@pytest.fixture(scope="module")
def judge(real, split):
    images, labels = real
    return digits.train_classifier(images[split[0]], labels[split[0]], seed=0)


def test_held_out_digits_are_told_apart(real, split, judge):
    images, labels = real
    assert digits.evaluate(judge, images[split[1]], labels[split[1]]) >= 0.98


def test_distance_ranks_what_is_wrong_with_a_sample(real, judge):
    images, labels = real
    features = digits.features(judge, images)
    halves = digits.half_distance(features, labels, seed=0)
    order = np.random.default_rng(1).permutation(len(labels))
    first, second = order[::2], order[1::2]
    reference = Moments.of(features[first])

    def of(changed):
        return distance(reference, Moments.of(digits.features(judge, changed)))

    def blurred(radius):
        blur = ImageFilter.GaussianBlur(radius)
        return np.stack([np.asarray(Image.fromarray(i).filter(blur)) for i in images[second]])

    noise = np.random.default_rng(2).normal(0, 50, (len(second), 32, 32, 3))
    good = of(images[second])
    slight, strong = of(blurred(1.5)), of(blurred(3))
    noisy = of(np.clip(images[second] + noise, 0, 255).astype(np.uint8))
    missing = of(images[second][labels[second] != 3])
    few = of(np.repeat(images[second[:10]], 90, 0))
    assert halves.spread < 0.2 * halves.mean
    assert good < 2 * halves.mean
    assert 2 * halves.mean < min(slight, noisy, missing)
    assert slight < strong and missing < few


def test_training_improves_on_the_start(small):
    images, labels = toy(seed=1)
    start = classifier.init(SMALL, jax.random.key(0))
    assert digits.evaluate(digits.Classifier(SMALL, start), images, labels) < 0.8
    assert digits.evaluate(small, images, labels) > 0.95


def test_training_is_a_function_of_data_and_seed(small):
    again, other = train(), train(seed=1)
    jax.tree.map(np.testing.assert_array_equal, small.params, again.params)
    assert not np.array_equal(small.params["logits"]["kernel"], other.params["logits"]["kernel"])


def test_rows_do_not_depend_on_the_batches_they_come_in(small, monkeypatch):
    images, _ = toy(n=11)
    whole = digits.features(small, images)
    monkeypatch.setattr(digits, "BATCH", 4)
    assert whole.shape == (11, 8) and whole.dtype == np.float32
    np.testing.assert_allclose(digits.features(small, images), whole, atol=1e-5)


def test_saved_classifier_comes_back_bit_for_bit(small, tmp_path):
    path = tmp_path / "judge.npz"
    assert digits.save(small, path) == digits.save(small, tmp_path / "again.npz")
    back = digits.load(path)
    assert back.config == small.config
    jax.tree.map(np.testing.assert_array_equal, small.params, back.params)


def test_changed_classifier_file_is_refused(small, tmp_path):
    path = tmp_path / "judge.npz"
    digits.save(small, path)
    arrays = dict(np.load(path))
    arrays["logits/bias"] = arrays["logits/bias"] + np.float32(1e-3)
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="digest"):
        digits.load(path)
    np.savez(path, arr_0=np.zeros(3))
    with pytest.raises(InputError, match="digest"):
        digits.load(path)


def test_halves_are_balanced_by_class():
    # One feature that is the class: balanced halves of even classes are identical sets.
    labels = np.repeat([0, 1, 2], [10, 20, 30])
    found = digits.half_distance(np.eye(3)[labels], labels, seed=0, splits=3)
    assert found.mean < 1e-12 and found.splits == 3


def test_halves_depend_on_the_seed():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 4)), np.arange(60) % 3
    first = digits.half_distance(features, labels, seed=0, splits=3)
    assert first == digits.half_distance(features, labels, seed=0, splits=3)
    assert first.mean != digits.half_distance(features, labels, seed=1, splits=3).mean
    assert first.spread > 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(60) % 3 + 1, "classes are 0 to 2"),
        (np.zeros(59, int), "one integer per image"),
        (np.zeros(60), "one integer per image"),
    ],
    ids=["class 3", "too few", "float"],
)
def test_bad_labels_are_refused(small, labels, message):
    images, _ = toy()
    with pytest.raises(InputError, match=message):
        digits.evaluate(small, images, labels)
    with pytest.raises(InputError, match=message):
        digits.train_classifier(images, labels, 0, config=SMALL)
