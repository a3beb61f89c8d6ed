"""From a picture's bytes to a uint8 RGB square: decode, resize the short side, crop."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps

from ldm_jax.errors import InputError

# PIL widens each of these by the reduction factor, so that shrinking never aliases.
KERNELS = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_PLAIN = ("1", "L", "P", "RGB", "CMYK", "YCbCr")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The one geometric draw of an example, which its image and all its fields obey."""

    resolution: int  # pixels
    kernel: str  # of the image's resize; maps take the nearest pixel
    place: float  # in [0, 1], of the crop along the long side; 0.5 is the centre
    mirrored: bool  # left to right; what that means for a field, its rule in MIRRORS says

    def crop_image(self, image: Image.Image) -> np.ndarray:
        """uint8 [R,R,3]."""
        cut = square(image, self.resolution, self.kernel, self.place)
        return np.asarray(cut.convert("RGB"))

    def crop_map(self, values: np.ndarray) -> np.ndarray:
        """[h,w,...] of the image's size -> [R,R,...]."""
        return square_map(values, self.resolution, self.place)


def decode(data: bytes, name: str) -> Image.Image:
    """The first frame as RGB, upright by its EXIF orientation, transparency laid on white.

    16-bit greys are scaled to 8 bits. Raises InputError, naming the image, when it cannot be read.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL lets a dozen kinds of exceptions out on broken files
        raise InputError(
            f"cannot decode image {name} ({len(data)} bytes): {type(error).__name__}: {error}; "
            "replace the file or remove it from the data set"
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        top = image.convert("RGBA")
        white = Image.new("RGBA", top.size, "white")
        return Image.alpha_composite(white, top).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's own conversion clips at 255 and would give white.
        grey = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(np.round(np.clip(grey, 0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode not in _PLAIN:
        raise ValueError(f"pixel mode {image.mode!r} is none of {_PLAIN}, grey 16 bits, with alpha")
    return image.convert("RGB")


def square(image: Image.Image, resolution: int, kernel: str, place: float = 0.5) -> Image.Image:
    """`cover` of a square: the short side resized to `resolution`, the long side cropped."""
    return cover(image, resolution, resolution, kernel, place)


def cover(
    image: Image.Image, height: int, width: int, kernel: str, place: float = 0.5
) -> Image.Image:
    """Resized until it just covers height x width, and the rest cropped.

    place in [0, 1] chooses the crop along the side that is too long: 0.5 is the centre. An image
    whose other side fits already is not resampled.
    """
    size, left, top = _covering(image.size, height, width, place)
    if size != image.size:
        image = image.resize(size, KERNELS[kernel])
    return image.crop((left, top, left + width, top + height))


def square_map(values: np.ndarray, resolution: int, place: float = 0.5) -> np.ndarray:
    """[h,w,...] -> [R,R,...]: the map of an image, cut as `square` cuts the image.

    Every place has the value of the nearest source pixel, as numbers of classes have no mean.
    """
    high, wide = values.shape[:2]
    size, left, top = _covering((wide, high), resolution, resolution, place)
    across, down = (np.arange(start, start + resolution) + 0.5 for start in (left, top))
    rows = (down * (high / size[1])).astype(np.int64)
    columns = (across * (wide / size[0])).astype(np.int64)
    return values[rows[:, None], columns]


def _covering(
    size: tuple[int, int], height: int, width: int, place: float
) -> tuple[tuple[int, int], int, int]:
    """The size (w, h) that just covers, and the left and top of the crop in it."""
    wide, high = size
    if wide * height >= high * width:
        size = (max(width, round(wide * height / high)), height)
    else:
        size = (width, max(height, round(high * width / wide)))
    return size, round((size[0] - width) * place), round((size[1] - height) * place)
