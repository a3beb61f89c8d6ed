import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ldm_jax.data.images import ImagesConfig, open_images
from ldm_jax.errors import InputError


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


class LdmShapes(tfds.core.GeneratorBasedBuilder):
    """A small prepared data set: image bytes, since arrays would need TensorFlow to encode."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(8, 12, 3)),
            "label": tfds.features.ClassLabel(names=["disc", "ring"]),
            "caption": tfds.features.Text(),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 12), "test": self._generate_examples(12, 16)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            data = png(i) if i != 15 else b"broken"
            row = {"image": data, "label": i % 2, "caption": f"Form {i}", "file_name": "x"}
            yield i, row


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    LdmShapes(data_dir=place, file_format="array_record").download_and_prepare()
    return str(place)


def opened(path, split="train", **options):
    options = {"name": "ldm_shapes", "held_out_split": "test", "resolution": 8, **options}
    return open_images(ImagesConfig("tfds", path, **options), split, augment=False)


def test_tfds_gives_images_labels_and_captions(prepared):
    images = opened(prepared)
    batch = images.read(np.arange(12), np.arange(12))
    values = batch["image"][:, 0, 0, 0]
    assert batch["image"].shape == (12, 8, 8, 3) and sorted(values) == list(range(12))
    np.testing.assert_array_equal(batch["label"], values % 2)
    assert batch["caption"].tolist() == [f"Form {v}" for v in values]
    assert images.class_names == ("disc", "ring") and images.has_captions


def test_tfds_splits_take_expressions_and_change_the_fingerprint(prepared):
    part = opened(prepared, train_split="train[:50%]")
    assert len(part) == 6
    rest = opened(prepared, train_split="train[50%:]")
    assert len({s.fingerprint() for s in (part, rest, opened(prepared))}) == 3
    assert opened(prepared).fingerprint() == opened(prepared).fingerprint()


def test_tfds_names_a_corrupt_image(prepared):
    images = opened(prepared, "held_out")
    with pytest.raises(InputError, match=r"cannot decode image \d of tfds data set 'ldm_shapes'"):
        images.read(np.arange(4), np.arange(4))


def test_tfds_says_how_to_prepare_a_missing_data_set(prepared, tmp_path):
    with pytest.raises(InputError, match=r"not prepared; prepare it once: .*array_record"):
        opened(str(tmp_path))
    with pytest.raises(InputError, match=r"'no_such_set_at_all' .*cannot be opened"):
        opened(prepared, name="no_such_set_at_all")
    with pytest.raises(InputError, match=r"needs the name"):
        opened(prepared, name="")


def test_tfds_lists_the_splits_when_one_is_unknown(prepared):
    with pytest.raises(InputError, match=r"no split 'dev' \(splits: \['test', 'train'\]\)"):
        opened(prepared, train_split="dev")
