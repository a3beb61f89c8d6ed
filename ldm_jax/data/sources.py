"""What every image source gives, and the two sources of a library: digits and tfds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.data import draws, pixels
from ldm_jax.data.fields import CAPTION, LABEL, Field
from ldm_jax.errors import InputError
from ldm_jax.files import digest_json

Example = dict[str, Any]  # "image": RGB or grey PIL image, and an array per array of the fields

_CAPTIONS = ("caption", "captions", "text")  # other Text features are file names, ids, urls


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set; its examples have a fixed order.

    `fields` is what an example has beside its image, the label always among them. A map, such as
    classes by pixel, is [h,w,...] in an example, of the picture's own size; its field has the shape
    [R,R,...] of the square that training cuts from both.
    """

    num_examples: int
    class_names: tuple[str, ...]
    fields: tuple[Field, ...]
    identity: str  # sha256 hex of what the split holds
    load: Callable[[np.ndarray], list[Example]]  # indices int64 [b]; InputError for a broken image
    listing: str = ""  # sha256 hex of names and labels without contents, where that is less
    # Examples around the same places, moved: indices [b], vertical and horizontal shares [b,2] in
    # [0, 1). Only of a source whose examples are cut from something larger.
    load_at: Callable[[np.ndarray, np.ndarray], list[Example]] | None = None


def digits(split: str, resolution: int, kernel: str, held_out_fraction: float) -> Source:
    """The 1,797 real handwritten 8x8 digits bundled with scikit-learn, enlarged and grey.

    The same share of every class is held out, chosen by a fixed draw.
    """
    images, labels = _digits(resolution, kernel)
    held_out = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        count = round(held_out_fraction * len(members))
        held_out[
            members[draws.permutation(0, "digits held out", (label, 0), len(members))[:count]]
        ] = 1
    chosen = np.flatnonzero(held_out == (split == "held_out"))

    def load(indices: np.ndarray) -> list[Example]:
        return [{"image": images[i], "label": int(labels[i])} for i in chosen[indices]]

    return Source(
        num_examples=len(chosen),
        class_names=tuple("0123456789"),
        fields=(LABEL,),
        identity=digest_json(["digits", chosen.tolist()]),
        load=load,
    )


@functools.lru_cache(maxsize=2)
def _digits(resolution: int, kernel: str) -> tuple[list[Image.Image], np.ndarray]:
    from sklearn.datasets import load_digits  # seconds to import

    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)  # values 0..16
    return [pixels.square(Image.fromarray(a), resolution, kernel) for a in grey], data.target


def tfds(name: str, data_dir: str, tfds_split: str) -> Source:
    """A prepared TensorFlow Datasets image set, read from ArrayRecord without TensorFlow.

    The image is the only feature of kind Image, the label the first ClassLabel by name, the
    caption a Text feature called caption, captions or text. Raises InputError when the set is not
    prepared in a format that gives random access, or has no such split or image.
    """
    if not name:
        raise InputError(
            "the tfds source needs the name of a data set; set name=, for example name=flowers"
        )
    import tensorflow_datasets as library  # about a second, and only this source needs it

    where = f"tfds data set {name!r} in {data_dir or 'the default data_dir'}"
    remedy = (
        f"prepare it once: tfds.builder({name!r}, data_dir={data_dir or None!r}, "
        "file_format='array_record').download_and_prepare(); or set path= to its data_dir"
    )
    try:
        builder = library.builder(name, data_dir=data_dir or None)
    except Exception as error:  # tfds raises unrelated kinds for unknown names
        raise InputError(f"{where} cannot be opened: {_first_line(error)}; {remedy}") from error
    if not builder.info.splits:
        raise InputError(f"{where} is not prepared; {remedy}")
    image_key, label_key, caption_key = _keys(builder.info.features, library.features, where)
    skip = {image_key: library.decode.SkipDecoding()}
    try:
        records = builder.as_data_source(split=tfds_split, decoders=skip)
    except NotImplementedError as error:
        raise InputError(f"{where} is stored without random access; {remedy}") from error
    except Exception as error:
        raise InputError(
            f"{where} has no split {tfds_split!r} (splits: {sorted(builder.info.splits)}); set "
            f"train_split= and held_out_split= ({_first_line(error)})"
        ) from error

    def load(indices: np.ndarray) -> list[Example]:
        out = []
        for i, record in zip(indices, records.__getitems__([int(i) for i in indices]), strict=True):
            image = pixels.decode(record[image_key], f"{i} of {where}, split {tfds_split}")
            example = {"image": image, "label": int(record[label_key]) if label_key else 0}
            if caption_key:
                example["caption"] = record[caption_key].decode()
            out.append(example)
        return out

    names = builder.info.features[label_key].names if label_key else ("all",)
    shards = [list(builder.info.splits[s].shard_lengths) for s in sorted(builder.info.splits)]
    return Source(
        num_examples=len(records),
        class_names=tuple(names),
        fields=(LABEL, CAPTION) if caption_key else (LABEL,),
        identity=digest_json(["tfds", builder.info.full_name, tfds_split, len(records), shards]),
        load=load,
    )


def _keys(features: Any, kinds: Any, where: str) -> tuple[str, str, str]:
    images = [k for k in sorted(features) if isinstance(features[k], kinds.Image)]
    if len(images) != 1:
        raise InputError(
            f"{where} has {len(images)} image features {images} among {sorted(features)}; exactly "
            "one is needed: choose another data set or config of it"
        )
    labels = [k for k in sorted(features) if isinstance(features[k], kinds.ClassLabel)]
    texts = [k for k in sorted(features) if isinstance(features[k], kinds.Text) and k in _CAPTIONS]
    return images[0], (labels or [""])[0], (texts or [""])[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
