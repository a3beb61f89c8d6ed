import importlib.util

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import photographs
from ldm_jax.data.images import ImagesConfig, open_images
from ldm_jax.errors import InputError


def opened(split="train", augment=False, seed=0, **options):
    config = ImagesConfig("photographs", **{"resolution": 32, **options})
    return open_images(config, split, augment=augment, seed=seed)


def every(images):
    return images.read(np.arange(len(images)), np.arange(len(images)))


@pytest.fixture
def ramps(monkeypatch):
    """Each picture is its own map: red, green count pairs of columns, rows; blue their parity."""
    pictures = []
    for width, height in ((500, 300), (451, 300), (302, 402)):
        rows, columns = np.indices((height, width))
        channels = [columns // 2, rows // 2, columns % 2 + 2 * (rows % 2)]
        pictures.append(Image.fromarray(np.stack(channels, -1).astype(np.uint8)))
    monkeypatch.setattr(photographs, "_pictures", lambda: (pictures, ["a", "b", "c"]))
    return pictures


@pytest.mark.parametrize("crop", ["center", "random"])
def test_no_training_square_has_a_held_out_pixel(ramps, crop):
    held_out, train = every(opened("held_out")), opened("train", augment=True, crop=crop)
    repeats = np.arange(20 * len(train))
    batch = train.read(repeats % len(train), repeats)
    for i in range(len(ramps)):
        left = batch["image"][batch["label"] == i][..., 0]
        right = held_out["image"][held_out["label"] == i][..., 0]
        assert len(left) and len(right)
        assert left.max() < right.min()


def test_random_squares_reach_every_edge_of_the_training_region(ramps):
    train = opened("train", augment=True, crop="random")
    cell = int(np.flatnonzero(every(train)["label"] == 0)[0])
    positions = np.arange(4000)
    image = train.read(np.full(4000, cell), positions)["image"]
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    columns, rows = 2 * red + blue % 2, 2 * green + blue // 2
    # 332 x 300 pixels of 500 x 300 are for training.
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (0, 331, 0, 299)
    assert abs(np.corrcoef(columns[:, 0, 0], rows[:, 0, 0])[0, 1]) < 0.1


def test_cells_of_one_scale_share_no_pixel_and_reach_both_edges():
    for size, side in ((213, 64), (128, 64), (64, 64), (427, 32)):
        starts = photographs._starts(size, side)
        assert starts[0] == 0 and len(starts) == size // side
        assert (np.diff(starts) >= side).all()
        if len(starts) > 1:
            assert starts[-1] == size - side


def test_the_half_scale_is_the_mean_of_four_pixels():
    regions = photographs._regions(photographs._pictures()[0], "held_out")
    whole, half = (regions[0, reduction].astype(float) for reduction in (1, 2))
    h, w = half.shape[:2]
    mean = whole[: 2 * h, : 2 * w].reshape(h, 2, w, 2, 3).mean((1, 3))
    assert np.abs(half - mean).max() <= 0.5


def test_squares_depend_on_seed_and_position_alone():
    train = opened("train", augment=True, crop="random", flip=True)
    indices, positions = np.arange(12), np.arange(12) + 1000
    whole = train.read(indices, positions)["image"]
    again = opened("train", augment=True, crop="random", flip=True)
    np.testing.assert_array_equal(again.read(indices[5:], positions[5:])["image"], whole[5:])
    assert not np.array_equal(train.read(indices, positions + 1)["image"], whole)
    other = opened("train", augment=True, crop="random", flip=True, seed=1)
    assert not np.array_equal(other.read(indices, positions)["image"], whole)


def test_without_augment_nothing_is_random():
    images = opened("train", crop="random", flip=True)
    n = np.arange(8)
    np.testing.assert_array_equal(images.read(n, n)["image"], images.read(n, n + 77)["image"])


def test_seven_photographs_in_colour_at_two_scales():
    train, held_out = opened(resolution=64), opened("held_out", resolution=64)
    assert train.num_classes == 7 and train.class_names[:2] == ("china", "flower")
    assert (len(train), len(held_out)) == (306, 138)
    batch = every(held_out)
    assert batch["image"].shape == (138, 64, 64, 3) and batch["image"].dtype == np.uint8
    assert set(batch["label"]) == set(range(7))
    spread = batch["image"].astype(float).std(-1).mean((1, 2))
    assert spread.mean() > 10  # of the channels: grey images would give 0


def test_fingerprint_follows_contents_and_listing_does_not(monkeypatch):
    before = opened()
    assert before.fingerprint() != opened("held_out").fingerprint()
    assert before.listing() != opened(resolution=48).listing()
    pictures, contents = photographs._pictures()
    monkeypatch.setattr(photographs, "_pictures", lambda: (pictures, ["x", *contents[1:]]))
    after = opened()
    assert after.fingerprint() != before.fingerprint() and after.listing() == before.listing()


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_square_larger_than_the_smallest_region_is_refused(split):
    with pytest.raises(InputError, match=r"resolution 152 must be at most 151 .*choose a smaller"):
        opened(split, resolution=152)


def test_without_scikit_image_the_remedy_is_named(monkeypatch):
    photographs._pictures.cache_clear()
    real = importlib.util.find_spec

    def missing(name, *rest):
        return None if name == "skimage" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(InputError, match="pip install scikit-image"):
        opened()


def test_a_package_without_a_picture_is_named(monkeypatch):
    photographs._pictures.cache_clear()
    monkeypatch.setitem(photographs.FILES, "rocket", ("skimage.data", "no_such.jpg"))
    with pytest.raises(InputError, match=r"finds no no_such\.jpg in skimage\.data; pip install"):
        opened()
    photographs._pictures.cache_clear()
