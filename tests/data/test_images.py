import shutil

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.data.fields import LABEL, Field
from ldm_jax.data.images import SOURCES, ImagesConfig, open_images
from ldm_jax.data.order import Order
from ldm_jax.data.stream import batches
from ldm_jax.errors import InputError
from tests.data import toy


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve wide images of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(12):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        noise(24, 10, i).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


def wide(photos, **options):
    config = ImagesConfig("folder", str(photos), resolution=8, held_out_fraction=0.0, **options)
    return open_images(config, "train", augment=True, seed=3)


def test_digits_splits_are_disjoint_stratified_and_complete():
    config = ImagesConfig(held_out_fraction=1 / 6, resolution=8)
    train, held_out = (open_images(config, s, augment=False) for s in ("train", "held_out"))
    assert len(train) + len(held_out) == 1797 and len(held_out) == 299
    a, b = (s.read(np.arange(len(s)), np.arange(len(s))) for s in (train, held_out))
    counts = np.bincount(b["label"]) / np.bincount(np.concatenate([a["label"], b["label"]]))
    assert np.abs(counts - 1 / 6).max() < 0.01
    from sklearn.datasets import load_digits

    data = load_digits()
    both = np.concatenate([a["image"], b["image"]])[..., 0].reshape(1797, 64).astype(int)
    real = np.round(data.images.reshape(1797, 64) * 255 / 16).astype(int)
    assert sorted(map(tuple, both)) == sorted(map(tuple, real))


def test_digits_are_grey_squares_with_their_labels_when_enlarged():
    images = open_images(ImagesConfig(), "train", augment=False)
    batch = images.read(np.arange(16), np.arange(16))
    assert batch["image"].shape == (16, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert (batch["image"][..., 0] == batch["image"][..., 2]).all()
    assert batch["image"].max() == 255 and batch["label"].dtype == np.int32
    assert images.num_classes == 10 and images.class_names[7] == "7" and not images.has_captions


def test_augmentation_depends_on_seed_and_position_alone(photos):
    images = wide(photos, crop="random", flip=True)
    indices, positions = np.arange(12), np.arange(12) + 1000
    whole = images.read(indices, positions)["image"]
    for rows in (np.array([7]), np.array([11, 2, 5])):
        part = images.read(indices[rows], positions[rows])["image"]
        np.testing.assert_array_equal(part, whole[rows])
    assert not np.array_equal(images.read(indices, positions + 1)["image"], whole)


def test_augmentation_is_the_same_for_every_process_count(photos):
    images = wide(photos, crop="random", flip=True)
    order = Order(len(images), 3)

    def first(shards, index):
        stream = batches(images.read, order, 8, shard_index=index, shard_count=shards, start_step=2)
        batch = next(stream)["image"]
        stream.close()
        return batch

    joined = np.concatenate([first(2, 0), first(2, 1)])
    np.testing.assert_array_equal(joined, first(1, 0))


def test_flip_mirrors_about_half_and_nothing_else(photos):
    plain, flipped = wide(photos), wide(photos, flip=True)
    same = mirrored = 0
    for position in range(200):
        at = np.array([position])
        a, b = (s.read(at % 12, at)["image"][0] for s in (plain, flipped))
        same += np.array_equal(a, b)
        mirrored += np.array_equal(a[:, ::-1], b)
    assert same + mirrored == 200 and 70 < mirrored < 130


def test_random_crop_reaches_both_ends_and_centre_crop_the_middle(photos):
    path = photos / "a" / "00.png"
    high = pixels.square(Image.open(path), 10, "box", 0.0)
    np.testing.assert_array_equal(np.asarray(high), np.asarray(Image.open(path))[:, :10])
    middle = pixels.square(Image.open(path), 10, "box")
    np.testing.assert_array_equal(np.asarray(middle), np.asarray(Image.open(path))[:, 7:17])
    config = ImagesConfig(
        "folder", str(photos), resolution=10, crop="random", held_out_fraction=0.0
    )
    images = open_images(config, "train", augment=True)
    whole = np.asarray(Image.open(path))
    found = set()
    for position in range(150):
        crop = images.read(np.array([0]), np.array([position]))["image"][0]
        found |= {x for x in range(15) if np.array_equal(whole[:, x : x + 10], crop)}
    assert found == set(range(15))


def test_without_augment_nothing_is_random(photos):
    config = ImagesConfig("folder", str(photos), resolution=8, crop="random", flip=True)
    images = open_images(config, "train", augment=False)
    n = len(images)
    a = images.read(np.arange(n), np.arange(n))["image"]
    b = images.read(np.arange(n), np.arange(n) + 77)["image"]
    np.testing.assert_array_equal(a, b)


@pytest.fixture
def toys(monkeypatch):
    """Opens the toy source with any fields, its training squares augmented."""

    def opened(*fields, crop="random", flip=True, **changes):
        made = toy.source(*fields, **changes)
        monkeypatch.setitem(SOURCES, "toy", lambda config, split: made)
        config = ImagesConfig("toy", resolution=toy.RESOLUTION, crop=crop, flip=flip)
        return open_images(config, "train", augment=True, seed=3)

    return opened


def test_a_map_stays_on_its_picture_whatever_the_crop_and_the_flip(toys):
    images = toys()
    positions = np.arange(300)
    batch = images.read(positions % toy.COUNT, positions)
    np.testing.assert_array_equal(batch["semantic"], batch["image"][..., 2].astype(int) + 1000)
    columns = batch["image"][:, 0, :, 0].astype(int)
    mirrored = columns[:, 0] > columns[:, -1]
    assert 100 < mirrored.sum() < 200 and len(np.unique(columns.min(1))) == 14
    for row, i in enumerate(positions[:50] % toy.COUNT):
        example, left = toy.example(int(i)), columns[row].min()
        cut = example["semantic"][:, left : left + toy.RESOLUTION]
        np.testing.assert_array_equal(
            batch["semantic"][row], cut[:, ::-1] if mirrored[row] else cut
        )
        for name in ("tokens", "embedding", "label"):
            np.testing.assert_array_equal(batch[name][row], example[name])


def test_further_fields_leave_the_pictures_as_they_are(toys):
    n = np.arange(toy.COUNT)
    plain, rich = toys(LABEL).read(n, n + 50), toys().read(n, n + 50)
    assert set(plain) == {"image", "label"}
    assert set(rich) == {"image", *(field.name for field in toy.FIELDS)}
    np.testing.assert_array_equal(plain["image"], rich["image"])


def test_fields_follow_the_mirroring_of_their_picture_where_a_copy_is_stored(toys):
    images = toys(LABEL, toy.CLIP)
    positions = np.arange(100)
    batch = images.read(positions % toy.COUNT, positions)
    columns = batch["image"][:, 0, :, 0].astype(int)
    mirrored = columns[:, 0] > columns[:, -1]
    np.testing.assert_array_equal(batch["clip"][:, 0] < 0, mirrored)
    assert "clip_mirrored" not in batch
    both = toys(LABEL, toy.CLIP, flip=False).read(np.arange(5), np.arange(5))
    np.testing.assert_array_equal(both["clip_mirrored"], -1 - both["clip"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"example 4 has no tokens, a field of its source; mend"),
        ({"tokens": np.zeros(4, np.int32)}, r"tokens of example 4 has shape \(4,\), not \(5,\)"),
        ({"tokens": np.zeros(5)}, r"tokens of example 4 is float64 \(5,\) but the field is int32"),
        ({"semantic": np.zeros((8, 20), int)}, r"shape \(8, 20\) but its image \(8, 21\)"),
        ({"semantic": np.zeros((8, 21, 2), int)}, r"shape \(8, 8, 2\), not \(8, 8\)"),
        ({"embedding": np.full((5, 3), np.nan)}, r"embedding of example 4 are not finite"),
    ],
)
def test_an_example_that_is_not_what_its_fields_say_is_named(toys, changes, message):
    with pytest.raises(InputError, match=message):
        toys(**changes).read(np.array([4]), np.array([0]))


def test_flips_are_refused_where_a_field_has_no_mirrored_form(toys):
    written = Field("written", (), "int32", "none")
    with pytest.raises(InputError, match=r"train split of toy has no mirrored written but flips"):
        toys(LABEL, written)
    toys(LABEL, written, flip=False)


def test_fingerprint_follows_the_files_and_the_recipe_and_not_the_place(photos, tmp_path):
    def print_of(root, **options):
        config = ImagesConfig("folder", str(root), **{"resolution": 8, **options})
        return open_images(config, "train", augment=False).fingerprint()

    copy = tmp_path / "elsewhere"
    shutil.copytree(photos, copy)
    assert print_of(photos) == print_of(copy)
    assert print_of(photos, flip=True, crop="random") == print_of(photos)  # not augmented
    assert print_of(photos, kernel="lanczos") != print_of(photos)
    assert print_of(photos, resolution=9) != print_of(photos)
    noise(30, 30).save(copy / "a" / "00.png")
    assert print_of(copy, held_out_fraction=0.0) != print_of(photos, held_out_fraction=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "webdataset"}, r"images\.source 'webdataset' is unknown; choose one of"),
        ({"kernel": "cubic"}, r"images\.kernel 'cubic'"),
        ({"crop": "middle"}, r"images\.crop 'middle'"),
        ({"resolution": 0}, r"images\.resolution 0"),
        ({"held_out_fraction": 1.0}, r"images\.held_out_fraction 1\.0 must be in"),
    ],
)
def test_config_refuses_values_it_does_not_know(options, message):
    with pytest.raises(InputError, match=message):
        ImagesConfig(**options)


def test_open_images_refuses_an_unknown_or_empty_split():
    with pytest.raises(InputError, match=r"split 'test' is unknown"):
        open_images(ImagesConfig(), "test", augment=False)
    with pytest.raises(InputError, match=r"held_out split of digits .*empty.*held_out_fraction 0"):
        open_images(ImagesConfig(held_out_fraction=0.0), "held_out", augment=False)


def test_every_source_is_named_in_the_config():
    assert set(SOURCES) == {"digits", "folder", "photographs", "tfds"}
