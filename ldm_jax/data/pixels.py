"""From a file's bytes to a uint8 RGB square: decode, resize the short side, crop."""

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
    wide, high = image.size
    if wide * height >= high * width:
        size = (max(width, round(wide * height / high)), height)
    else:
        size = (width, max(height, round(high * width / wide)))
    if size != image.size:
        image = image.resize(size, KERNELS[kernel])
    left = round((size[0] - width) * place)
    top = round((size[1] - height) * place)
    return image.crop((left, top, left + width, top + height))
