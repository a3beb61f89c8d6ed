"""Images on disk: PNG grids to look at, and `.npz` files in the layout of ADM's evaluator."""

import io
import os

import numpy as np
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.files import read_npz, write_bytes, write_npz


def png_bytes(image: np.ndarray) -> bytes:
    """The PNG file of one uint8 image [H,W,3]; raises InputError for anything else."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise InputError(f"image {image.dtype} {image.shape}: a PNG is written from uint8 [H,W,3]")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 [N,H,W,3] -> one uint8 image, row by row; gaps and missing cells are white."""
    images = check_images(images)
    if columns < 1 or len(images) < 1:
        raise InputError(
            f"a grid of {len(images)} images in {columns} columns: both must be positive"
        )
    n, h, w, c = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[top : top + h, left : left + w] = image
    return canvas


def save_grid(images: np.ndarray, path: str | os.PathLike, columns: int) -> None:
    """Writes uint8 images [N,H,W,3] as one PNG, row by row."""
    write_bytes(path, png_bytes(grid(images, columns)))


def save_npz(images: np.ndarray, labels: np.ndarray | None, path: str | os.PathLike) -> None:
    """Writes `arr_0` uint8 [N,H,W,3] and, with labels, `arr_1` int64 [N], as ADM's evaluator reads.

    Layout: Dhariwal and Nichol's guided-diffusion, evaluations/README.md.
    """
    arrays = {"arr_0": check_images(images)}
    if labels is not None:
        arrays["arr_1"] = _check_labels(labels, len(images))
    write_npz(path, arrays)


def load_npz(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray | None]:
    """(images uint8 [N,H,W,3], labels int64 [N] or None); raises InputError for any other file."""
    arrays = read_npz(path)
    if "arr_0" not in arrays:
        raise InputError(
            f"{path} holds {sorted(arrays)}: samples are uint8 [N,H,W,3] under `arr_0`; write them "
            "with `ldm sample`"
        )
    images = check_images(arrays["arr_0"], f"{path}: arr_0")
    labels = arrays.get("arr_1")
    return images, None if labels is None else _check_labels(labels, len(images), f"{path}: arr_1")


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    """`images` as an array; raises InputError unless it is uint8 [N,H,W,3]."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"{name} is {images.dtype} {images.shape}: the rule is uint8 [N,H,W,3]")
    return images


def _check_labels(labels, count, name="labels"):
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"{name} is {labels.dtype} {labels.shape}: the rule is one integer per image, [{count}]"
        )
    return labels.astype(np.int64)
