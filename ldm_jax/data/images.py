"""Images as training reads them: uint8 squares, the same whoever reads them and wherever."""

import dataclasses

import numpy as np

from ldm_jax.data import draws, fields, pixels
from ldm_jax.data.fields import CAPTION, Field
from ldm_jax.data.folder import folder
from ldm_jax.data.photographs import photographs
from ldm_jax.data.sources import Example, Source, digits, tfds
from ldm_jax.errors import InputError, choose, within
from ldm_jax.files import digest_json

SPLITS = ("train", "held_out")
CROPS = ("center", "random")
_MEND = "mend the example, or its source's field"

Row = tuple[int, Example, pixels.Geometry]  # an example's index, contents and geometric draw


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how they become squares of resolution x resolution."""

    source: str = "digits"  # a name of SOURCES
    path: str = ""  # folder: its root; tfds: the data_dir, "" = the library's default
    name: str = ""  # tfds: name of the data set
    train_split: str = "train"  # tfds: any split expression, such as "train[:90%]"
    held_out_split: str = "validation"  # tfds
    held_out_fraction: float = 0.1  # digits, and folders without splits; photographs: a third
    resolution: int = 32  # pixels
    kernel: str = "bicubic"  # of the antialiased resize; a name of pixels.KERNELS
    crop: str = (
        "center"  # along the long side (photographs: anywhere), in training: center | random
    )
    flip: bool = False  # in training: mirror left to right with probability 1/2

    def __post_init__(self):
        choose("images.source", self.source, SOURCES)
        choose("images.kernel", self.kernel, pixels.KERNELS)
        choose("images.crop", self.crop, CROPS)
        within("images.resolution", self.resolution, "[1, inf)", "in pixels")
        remedy = "it is the share of the images kept from training"
        within("images.held_out_fraction", self.held_out_fraction, "[0, 1)", remedy)


def _open_digits(config: ImagesConfig, split: str) -> Source:
    return digits(split, config.resolution, config.kernel, config.held_out_fraction)


def _open_folder(config: ImagesConfig, split: str) -> Source:
    return folder(config.path, split, config.held_out_fraction)


def _open_tfds(config: ImagesConfig, split: str) -> Source:
    name = config.train_split if split == "train" else config.held_out_split
    return tfds(config.name, config.path, name)


def _open_photographs(config: ImagesConfig, split: str) -> Source:
    return photographs(split, config.resolution)


SOURCES = {
    "digits": _open_digits,
    "folder": _open_folder,
    "photographs": _open_photographs,
    "tfds": _open_tfds,
}


@dataclasses.dataclass(frozen=True)
class ImageSplit:
    """One opened split; `read` is what `stream.batches` takes."""

    source: Source
    recipe: dict[str, str | int | bool]  # what was done to the images; part of the fingerprint
    seed: int

    def __len__(self) -> int:
        return self.source.num_examples

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def fields(self) -> tuple[Field, ...]:
        """What a batch holds beside the image."""
        return self.source.fields

    @property
    def has_captions(self) -> bool:
        return CAPTION in self.fields

    def read(self, indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": uint8 [b,R,R,3], "label": int32 [b]} and the source's other fields by name.

        `positions` are the examples' places in the global stream: augmentation is drawn from
        (seed, position), never by worker or host. Image values are 0..255; the device scales them
        to [-1, 1]. Without flips, the mirrored copies of fields that have one are there too.
        Raises InputError, naming the file or the example, for an image that cannot be decoded and
        for a value that is not what its field says.
        """
        indices = np.asarray(indices, np.int64)
        geometries = self._geometries(positions)
        flips = np.array([geometry.mirrored for geometry in geometries], bool)
        rows = list(zip(indices, self._load(indices, positions), geometries, strict=True))
        batch = {}
        for field in (fields.image(int(self.recipe["resolution"])), *self.fields):
            arrays = {name: _column(field, name, rows) for name in field.array_names}
            arrays = fields.checked(field, arrays, indices, _MEND)
            if not self.recipe["flip"]:
                batch |= {name: fields.to_batch(field, array) for name, array in arrays.items()}
            batch[field.name] = fields.to_batch(field, fields.flipped(field, arrays, flips))
        return batch

    def _geometries(self, positions: np.ndarray) -> list[pixels.Geometry]:
        resolution, kernel = int(self.recipe["resolution"]), str(self.recipe["kernel"])
        drawn = draws.uniforms(self.seed, "augment", positions, 2)
        places = drawn[:, 0] if self.recipe["crop"] == "random" else np.full(len(drawn), 0.5)
        flips = (drawn[:, 1] < 0.5) & bool(self.recipe["flip"])
        return [
            pixels.Geometry(resolution, kernel, place, flip)
            for place, flip in zip(places, flips, strict=True)
        ]

    def _load(self, indices: np.ndarray, positions: np.ndarray) -> list[Example]:
        if self.recipe["crop"] == "random" and self.source.load_at:
            return self.source.load_at(indices, draws.uniforms(self.seed, "offset", positions, 2))
        return self.source.load(indices)

    def listing(self) -> str:
        """sha256 hex of which examples there are, in order; a mended file keeps it."""
        return digest_json([self.source.listing or self.source.identity, self.source.num_examples])

    def fingerprint(self) -> str:
        """sha256 hex of what the split holds (names and sizes of files) and of the recipe."""
        return digest_json([self.source.identity, self.source.num_examples, self.recipe])


def _column(field: Field, name: str, rows: list[Row]) -> np.ndarray:
    values = [_cut(field, name, row) for row in rows]
    return np.stack(values) if values else np.empty((0, *field.shape), field.batch_dtype)


def _cut(field: Field, name: str, row: Row) -> np.ndarray:
    """One array of a field, as the square has it before any mirroring."""
    index, example, geometry = row
    if name == "image":
        return geometry.crop_image(example["image"])
    if name not in example:
        raise InputError(f"example {index} has no {name}, a field of its source; {_MEND}")
    value = np.asarray(example[name])
    if field.is_map:
        side = example["image"].size[::-1]
        if value.shape[:2] != side:
            raise InputError(
                f"{name} of example {index} has shape {value.shape} but its image {side}; {_MEND}"
            )
        value = geometry.crop_map(value)
    if value.shape != field.shape:  # before such values are stacked
        raise InputError(
            f"{name} of example {index} has shape {value.shape}, not {field.shape}; {_MEND}"
        )
    return value


def open_images(config: ImagesConfig, split: str, *, augment: bool, seed: int = 0) -> ImageSplit:
    """Opens the split "train" or "held_out"; without `augment`: centre crop and no flip.

    Raises InputError when the data is missing, malformed or empty.
    """
    choose("split", split, SPLITS)
    source = SOURCES[config.source](config, split)
    if not source.num_examples:
        raise InputError(
            f"the {split} split of {config.source} {config.name or config.path} is empty; "
            f"change held_out_fraction {config.held_out_fraction} or add images"
        )
    flip = config.flip and augment
    if flip:
        fields.check_mirrors(source.fields, f"the {split} split of {config.source}")
    recipe = {
        "source": config.source,
        "resolution": config.resolution,
        "kernel": config.kernel,
        "crop": config.crop if augment else "center",
        "flip": flip,
    }
    return ImageSplit(source, recipe, seed)
