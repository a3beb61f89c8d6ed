"""Images to measure, a batch in memory at a time: of an `.npz`, a folder or a run's split."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_jax import files
from ldm_jax.data import folder
from ldm_jax.data import images as image_data
from ldm_jax.errors import InputError

MAX_PIXELS = 64 << 20  # of one image; a small file can hold gigabytes
Batches = Callable[[int, int, int], Iterator[np.ndarray]]  # (start, stop, most at a time)
Read = Callable[[np.ndarray], np.ndarray]  # indices int64 [n] -> uint8 [n,H,W,3]


@dataclasses.dataclass(frozen=True)
class ImageStream:
    """What is measured: image i comes from `read`, which is called with indices in order."""

    num: int
    open: Callable[[int], Read]  # rows -> read, of at most so many indices a call
    name: str  # for errors
    digest: str  # of the data, or what says which weights made them
    rows: int = 0  # of this process in one reading; 0 = as many as the networks take
    keep: Path | None = None  # folder that reading writes the images into


def open_set(path: str | os.PathLike) -> ImageStream:
    """The images of an `.npz` in ADM's layout (`arr_0`), or those under a folder, sorted.

    Raises InputError before any image is decoded: for headers that lie, images of different sizes
    and of more than 64 megapixels.
    """
    if "://" in str(path) or Path(path).is_dir():
        return _folder(str(path))
    return _file(path)


def open_split(
    config: image_data.ImagesConfig, name: str, chosen: np.ndarray | None = None
) -> ImageStream:
    """A split of a run's images, or the `chosen` of them."""
    source = image_data.open_images(config, name, augment=False)
    chosen = np.arange(len(source), dtype=np.int64) if chosen is None else chosen

    def read(indices: np.ndarray) -> np.ndarray:
        if not len(indices):
            return np.zeros((0, config.resolution, config.resolution, 3), np.uint8)
        rows = chosen[indices]
        return source.read(rows, rows)["image"]

    digest = f"{name}:{len(chosen)}:{source.fingerprint()}"
    return ImageStream(len(chosen), lambda rows: read, f"the {name} images", digest)


def _stream(path, num: int, size: tuple[int, int], digest: str, batches: Batches) -> ImageStream:
    """Of images of one size, which calls of `read` go on with where the last one ended."""

    def reader(rows: int) -> Read:
        stream, after = iter(()), -1

        def read(indices: np.ndarray) -> np.ndarray:
            nonlocal stream, after
            if not len(indices):
                return np.zeros((0, *size, 3), np.uint8)
            if after < 0:
                stream = batches(int(indices[0]), num, rows)
            assert after in (-1, indices[0]), f"images {indices[0]} on, after {after}"
            after = int(indices[-1]) + 1
            return next(stream)[: len(indices)]

        return read

    return ImageStream(num, reader, f"images {path}", digest)


def _file(path) -> ImageStream:
    headers = files.headers(path)
    header = headers.get("arr_0")
    if header is None:
        raise InputError(
            f"{path} holds {sorted(headers)}: images are uint8 [N,H,W,3] under `arr_0`; write them "
            "with `ldm sample`"
        )
    shape = header.shape
    whole = len(shape) == 4 and shape[-1] == 3 and min(shape) > 0 and header.dtype == np.uint8
    if not whole or header.fortran:
        raise InputError(
            f"{path}: arr_0 is {header.dtype} {shape}{' in Fortran order' * header.fortran}: the "
            "rule is uint8 [N,H,W,3] in C order; write it again"
        )
    _check_pixels(shape[1] * shape[2], path)
    _check_labels(path, headers.get("arr_1"), shape[0])

    def batches(start: int, stop: int, count: int) -> Iterator[np.ndarray]:
        return files.rows(path, "arr_0", start, stop, count)

    return _stream(path, shape[0], (shape[1], shape[2]), files.sha256(path), batches)


def _check_labels(path, header: files.Header | None, num: int) -> None:
    if header and (header.shape != (num,) or header.dtype.kind not in "iu"):
        raise InputError(
            f"{path}: arr_1 is {header.dtype} {header.shape}: the rule is one integer per image, "
            f"[{num}]"
        )


def _folder(root: str) -> ImageStream:
    names = folder.image_files(root)
    lines, sizes = [], {}
    for name in names:
        (width, height), content = _measure(root, name)
        _check_pixels(width * height, f"{root}/{name}")
        sizes.setdefault((height, width), name)
        lines.append(f"{name}\0{content}\n")
    if len(sizes) > 1:
        (a, first), (b, second) = list(sizes.items())[:2]
        raise InputError(
            f"images under {root} have different sizes ({first} {a}, {second} {b}, height and "
            "width); crop them to one as the samples are"
        )
    (size,) = sizes

    def batches(start: int, stop: int, count: int) -> Iterator[np.ndarray]:
        for at in range(start, min(stop, len(names)), count):
            part = names[at : min(at + count, stop)]
            images = [np.asarray(folder.read_image(root, name)) for name in part]
            for name, image in zip(part, images, strict=True):
                if image.shape != (*size, 3):
                    raise InputError(
                        f"image {root}/{name} is {image.shape[:2]} when it stands upright, others "
                        f"{size}; crop them to one size"
                    )
            yield np.stack(images)

    return _stream(root, len(names), size, files.digest_of(lines), batches)


def _measure(root, name) -> tuple[tuple[int, int], str]:
    """((width, height), sha256 of the content) of an image, by the header of a local file.

    Other images of the same lengths are other images: files without compression all have one.
    """
    path = f"{root.rstrip('/')}/{name}"
    if "://" in root:
        image = folder.read_image(root, name)
        return image.size, files.digest(image.tobytes())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our rule is stricter
            with Image.open(path) as image:
                return image.size, files.sha256(path)
    except Exception as error:  # PIL lets a dozen kinds of exceptions out on broken files
        raise InputError(
            f"cannot read image {path}: {type(error).__name__}: {error}; replace or remove it"
        ) from error


def _check_pixels(pixels, name):
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{name} has {pixels} pixels an image: the most is {MAX_PIXELS}; shrink the images"
        )
