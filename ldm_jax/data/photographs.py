"""The colour photographs bundled with scikit-learn and scikit-image, cut into squares."""

import functools
import importlib.resources
import importlib.util
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.data.fields import LABEL
from ldm_jax.data.sources import Example, Source
from ldm_jax.errors import InputError
from ldm_jax.files import digest, digest_json

# Those inside the packages themselves: nothing is downloaded.
FILES = {
    "china": ("sklearn.datasets.images", "china.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "astronaut": ("skimage.data", "astronaut.png"),
    "cat": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
}
REDUCTIONS = (1, 2)  # each photograph as it is, and at half its size


class _Cell(NamedTuple):
    photograph: int
    reduction: int
    top: int  # pixels of the reduced region
    left: int


def photographs(split: str, resolution: int) -> Source:
    """Squares of `resolution` pixels of seven photographs; the classes are the photographs.

    Of each, the right-hand third is held out, whatever the resolution. An example is a cell of a
    regular grid over the split's region, at full or half scale; cells do not overlap unless cut at
    other places. Raises InputError without scikit-image and for a square that fits no region.
    """
    pictures, contents = _pictures()
    # Both regions, so that no training starts that could not be evaluated.
    smallest = min(min(p.height, _cut(p), p.width - _cut(p)) for p in pictures)
    if resolution > smallest:
        raise InputError(
            f"images.resolution {resolution} must be at most {smallest} with the photographs: the "
            "held-out third of the smallest one; choose a smaller one, or another source"
        )
    regions = _regions(pictures, split)
    cells = [
        _Cell(*key, top, left)
        for key, region in regions.items()
        for top in _starts(region.shape[0], resolution)
        for left in _starts(region.shape[1], resolution)
    ]

    def cut(cell: _Cell, top: int, left: int) -> Example:
        region = regions[cell.photograph, cell.reduction]
        square = region[top : top + resolution, left : left + resolution]
        return {"image": Image.fromarray(square), "label": cell.photograph}

    def load(indices: np.ndarray) -> list[Example]:
        return [cut(cells[i], cells[i].top, cells[i].left) for i in indices]

    def load_at(indices: np.ndarray, places: np.ndarray) -> list[Example]:
        out = []
        for i, place in zip(indices, places, strict=True):
            region = regions[cells[i].photograph, cells[i].reduction]
            ways = np.array(region.shape[:2]) - resolution + 1
            top, left = np.floor(place * ways).astype(int)
            out.append(cut(cells[i], int(top), int(left)))
        return out

    return Source(
        num_examples=len(cells),
        class_names=tuple(FILES),
        fields=(LABEL,),
        identity=digest_json(["photographs", split, contents, cells]),
        load=load,
        listing=digest_json(["photographs", split, list(FILES), cells]),
        load_at=load_at,
    )


def _starts(size: int, resolution: int) -> list[int]:
    """Where the cells begin: as many as fit side by side, spread from edge to edge."""
    count = size // resolution
    slack = size - count * resolution
    return [i * resolution + slack * i // max(count - 1, 1) for i in range(count)]


def _cut(picture: Image.Image) -> int:
    """The first held-out column; even, so that no halved pixel has parts of both regions."""
    return picture.width * 2 // 3 // 2 * 2


def _regions(pictures: list[Image.Image], split: str) -> dict[tuple[int, int], np.ndarray]:
    """uint8 [h,w,3] by (photograph, reduction)."""
    regions = {}
    for i, picture in enumerate(pictures):
        left, right = (0, _cut(picture)) if split == "train" else (_cut(picture), picture.width)
        for reduction in REDUCTIONS:
            whole = right - (right - left) % reduction
            box = (left, 0, whole, picture.height - picture.height % reduction)
            regions[i, reduction] = np.asarray(picture.crop(box).reduce(reduction))
    return regions


@functools.cache
def _pictures() -> tuple[list[Image.Image], list[str]]:
    if importlib.util.find_spec("skimage") is None:
        raise InputError(
            "images.source 'photographs' needs scikit-image, which carries five of its seven "
            "pictures; pip install scikit-image"
        )
    pictures, contents = [], []
    for package, name in FILES.values():
        try:
            data = (importlib.resources.files(package) / name).read_bytes()
        except (OSError, ImportError) as error:
            raise InputError(
                f"images.source 'photographs' finds no {name} in {package}; "
                "pip install 'scikit-image>=0.25' 'scikit-learn>=1.6'"
            ) from error
        pictures.append(pixels.decode(data, f"{package}/{name}"))
        contents.append(digest(data))
    return pictures, contents
