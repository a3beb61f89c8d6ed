"""Images as training reads them: uint8 squares, the same whoever reads them and wherever."""

import dataclasses

import numpy as np

from ldm_jax.data import draws, pixels
from ldm_jax.data.folder import folder
from ldm_jax.data.photographs import photographs
from ldm_jax.data.sources import Source, digits, tfds
from ldm_jax.errors import InputError
from ldm_jax.files import digest_json

SPLITS = ("train", "held_out")
CROPS = ("center", "random")


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
        known = {"source": tuple(SOURCES), "kernel": tuple(pixels.KERNELS), "crop": CROPS}
        for field, choices in known.items():
            value = getattr(self, field)
            if value not in choices:
                raise InputError(f"images.{field} {value!r} is unknown; choose one of {choices}")
        if self.resolution < 1:
            raise InputError(f"images.resolution {self.resolution} must be at least 1 pixel")
        if not 0 <= self.held_out_fraction < 1:
            raise InputError(
                f"images.held_out_fraction {self.held_out_fraction} must lie in [0, 1): the share "
                "of the images kept from training"
            )


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
    def has_captions(self) -> bool:
        return self.source.has_captions

    def read(self, indices: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """{"image": uint8 [b, R, R, 3], "label": int32 [b], with captions "caption": str [b]}.

        `positions` are the examples' places in the global stream: augmentation is drawn from
        (seed, position), never by worker or host. Values are 0..255; the device scales them to
        [-1, 1]. Raises InputError, naming the file, for an image that cannot be decoded.
        """
        indices = np.asarray(indices, np.int64)
        if self.recipe["crop"] == "random" and self.source.load_at:
            places = draws.uniforms(self.seed, "offset", positions, 2)
            examples = self.source.load_at(indices, places)
        else:
            examples = self.source.load(indices)
        resolution, kernel = int(self.recipe["resolution"]), str(self.recipe["kernel"])
        crop, flip = draws.uniforms(self.seed, "augment", positions, 2).T
        pictures = np.empty((len(examples), resolution, resolution, 3), np.uint8)
        for i, (image, _, _) in enumerate(examples):
            place = crop[i] if self.recipe["crop"] == "random" else 0.5
            picture = np.asarray(pixels.square(image, resolution, kernel, place).convert("RGB"))
            mirrored = self.recipe["flip"] and flip[i] < 0.5
            pictures[i] = picture[:, ::-1] if mirrored else picture
        batch = {"image": pictures, "label": np.array([e[1] for e in examples], np.int32)}
        if self.has_captions:
            batch["caption"] = np.array([e[2] for e in examples], np.str_)
        return batch

    def listing(self) -> str:
        """sha256 hex of which examples there are, in order; a mended file keeps it."""
        return digest_json([self.source.listing or self.source.identity, self.source.num_examples])

    def fingerprint(self) -> str:
        """sha256 hex of what the split holds (names and sizes of files) and of the recipe."""
        return digest_json([self.source.identity, self.source.num_examples, self.recipe])


def open_images(config: ImagesConfig, split: str, *, augment: bool, seed: int = 0) -> ImageSplit:
    """Opens the split "train" or "held_out"; without `augment`: centre crop and no flip.

    Raises InputError when the data is missing, malformed or empty.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose one of {SPLITS}")
    source = SOURCES[config.source](config, split)
    if not source.num_examples:
        raise InputError(
            f"the {split} split of {config.source} {config.name or config.path} is empty; "
            f"change held_out_fraction {config.held_out_fraction} or add images"
        )
    recipe = {
        "source": config.source,
        "resolution": config.resolution,
        "kernel": config.kernel,
        "crop": config.crop if augment else "center",
        "flip": config.flip and augment,
    }
    return ImageSplit(source, recipe, seed)
