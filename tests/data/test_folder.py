import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.images import ImagesConfig, open_images
from ldm_jax.errors import InputError


def paint(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, 0, 0)).save(path, quality=100)


def opened(root, split="train", fraction=0.0):
    config = ImagesConfig("folder", str(root), resolution=8, held_out_fraction=fraction)
    return open_images(config, split, augment=False)


def values(images):
    n = len(images)
    return images.read(np.arange(n), np.arange(n))["image"][:, 0, 0, 0].tolist()


def labels(images):
    n = len(images)
    return images.read(np.arange(n), np.arange(n))["label"].tolist()


def metadata(root, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_folder_reads_classes_in_sorted_order_and_recursively(tmp_path):
    for name, value in [("b/1.png", 10), ("a/z/2.png", 20), ("a/3.BMP", 30), ("b/.4.png", 40)]:
        paint(tmp_path / name, value)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    images = opened(tmp_path)
    assert images.class_names == ("a", "b") and images.num_classes == 2
    assert values(images) == [30, 20, 10] and labels(images) == [0, 0, 1]


def test_folder_reads_every_extension_it_names(tmp_path):
    for i, kind in enumerate(("png", "jpg", "jpeg", "webp", "bmp")):
        paint(tmp_path / f"{i}.{kind}", 50 * i)
    np.testing.assert_allclose(values(opened(tmp_path)), [0, 50, 100, 150, 200], atol=12)


def test_folder_is_one_class_when_flat(tmp_path):
    paint(tmp_path / "x.png", 1)
    paint(tmp_path / "y.png", 2)
    images = opened(tmp_path)
    assert images.num_classes == 1 and labels(images) == [0, 0]


def test_folder_follows_linked_classes(tmp_path):
    paint(tmp_path / "store" / "1.png", 9)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store")
    assert opened(tmp_path / "root").class_names == ("cat",)


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_folder_takes_its_own_splits_with_the_classes_of_training(tmp_path, held_out):
    paint(tmp_path / "train" / "a" / "1.png", 1)
    paint(tmp_path / "train" / "b" / "1.png", 2)
    paint(tmp_path / held_out / "b" / "1.png", 3)
    assert values(opened(tmp_path)) == [1, 2]
    kept = opened(tmp_path, "held_out")
    assert values(kept) == [3] and labels(kept) == [1] and kept.num_classes == 2


def test_folder_opens_a_lone_train_folder_as_the_whole(tmp_path):
    paint(tmp_path / "train" / "a" / "1.png", 1)
    paint(tmp_path / "train" / "b" / "1.png", 2)
    assert opened(tmp_path).class_names == ("a", "b")


def test_folder_refuses_a_held_out_class_that_training_lacks(tmp_path):
    paint(tmp_path / "train" / "a" / "1.png", 1)
    paint(tmp_path / "val" / "c" / "1.png", 3)
    with pytest.raises(InputError, match=r"classes \['c'\]"):
        opened(tmp_path, "held_out")


def test_folder_split_by_hash_never_moves_when_files_are_added(tmp_path):
    for i in range(40):
        paint(tmp_path / f"{i:03d}.png", i)
    before = set(values(opened(tmp_path, "held_out", 0.3)))
    train = set(values(opened(tmp_path, "train", 0.3)))
    assert before | train == set(range(40)) and not before & train and 4 <= len(before) <= 20
    for i in range(40, 80):
        paint(tmp_path / f"{i - 40:03d}b.png", i)
    after = set(values(opened(tmp_path, "held_out", 0.3)))
    assert {v for v in after if v < 40} == before


def test_metadata_gives_captions_and_only_the_images_it_names(tmp_path):
    for i in range(3):
        paint(tmp_path / "in" / f"{i}.png", i)
    metadata(
        tmp_path, [{"file_name": "in/2.png", "text": "ein Haus"}, "", {"file_name": "in/0.png"}]
    )
    images = opened(tmp_path)
    batch = images.read(np.arange(2), np.arange(2))
    assert images.has_captions and batch["caption"].tolist() == ["", "ein Haus"]
    assert values(images) == [0, 2] and labels(images) == [0, 0] and images.num_classes == 1


@pytest.mark.parametrize(
    ("given", "names", "numbers"),
    [([2, 0], ("0", "1", "2"), [2, 0]), (["dog", "cat"], ("cat", "dog"), [1, 0])],
)
def test_metadata_gives_labels(tmp_path, given, names, numbers):
    for i in range(2):
        paint(tmp_path / f"{i}.png", i)
    metadata(tmp_path, [{"file_name": f"{i}.png", "label": given[i]} for i in range(2)])
    images = opened(tmp_path)
    assert images.class_names == names and labels(images) == numbers


GOOD = {"file_name": "0.png", "text": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"file_name": "9.png"}], r"line 2 names '9\.png', which is no image"),
        ([GOOD, "{broken"], "line 2 must be a JSON object"),
        ([GOOD, {"text": "y"}], "line 2 must be a JSON object.*file_name"),
        ([GOOD, "[1]"], "line 2 must be a JSON object"),
        ([{"file_name": "0.png", "text": 7}], 'line 1: "text" must be a string'),
        ([{"file_name": "0.png", "label": -1}], "label"),
        ([GOOD, {"file_name": "1.png", "label": 1}], '1 of 2 lines have a "label"'),
        ([GOOD, {**GOOD, "file_name": "./0.png"}], "2 lines, 1 of them for a file named before"),
        ([], "has 0 lines"),
    ],
)
def test_metadata_is_refused_before_work_when_malformed(tmp_path, rows, message):
    for i in range(2):
        paint(tmp_path / f"{i}.png", i)
    metadata(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        opened(tmp_path)


def test_folder_refuses_to_open_without_images(tmp_path):
    with pytest.raises(InputError, match=r"source needs a path"):
        opened("")
    with pytest.raises(InputError, match=r"nowhere does not exist; give a folder of images"):
        opened(tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(InputError, match=r"note\.txt is a file; give a folder"):
        opened(tmp_path / "note.txt")
    with pytest.raises(InputError, match=r"holds no images"):
        opened(tmp_path)
    paint(tmp_path / "x.png", 0)
    with pytest.raises(InputError, match=r"held_out split of folder .* is empty"):
        opened(tmp_path, "held_out")


def test_folder_refuses_images_beside_its_classes(tmp_path):
    paint(tmp_path / "a" / "1.png", 1)
    paint(tmp_path / "stray.png", 1)
    with pytest.raises(InputError, match=r"such as stray\.png"):
        opened(tmp_path)


def test_folder_names_a_corrupt_or_vanished_image_when_it_is_read(tmp_path):
    paint(tmp_path / "0.png", 1)
    paint(tmp_path / "1.png", 1)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    images = opened(tmp_path)
    with pytest.raises(InputError, match=r"cannot decode image .*0\.png"):
        images.read(np.array([0]), np.array([0]))
    (tmp_path / "1.png").unlink()
    with pytest.raises(InputError, match=r"cannot read image .*1\.png"):
        images.read(np.array([1]), np.array([0]))


def test_folder_reads_addresses_of_other_file_systems():
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, value in [("a/1.png", 5), ("b/2.png", 6), ("b/.hidden/3.png", 7)]:
        with fs.open(f"/bucket/set/{name}", "wb") as file:
            Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    images = opened("memory://bucket/set")
    assert images.class_names == ("a", "b") and values(images) == [5, 6]
    with pytest.raises(InputError, match=r"cannot open nothing://x"):
        opened("nothing://x")
