import io

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import pixels
from ldm_jax.errors import InputError


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


def test_resize_is_antialiased_and_keeps_the_aspect():
    checks = np.indices((64, 128)).sum(0) % 2 * 255
    grey = pixels.square(Image.fromarray(checks.astype(np.uint8)), 8, "bicubic")
    assert grey.size == (8, 8)
    assert np.abs(np.asarray(grey).astype(int) - 127).max() <= 3
    tall = Image.fromarray(np.repeat(np.arange(100, dtype=np.uint8)[:, None], 20, 1))
    rows = np.asarray(pixels.square(tall, 10, "box"))[:, 0]
    assert rows.min() >= 39 and rows.max() <= 60  # rows 40..59 of 0..99, halved


def test_resize_leaves_an_image_alone_when_its_short_side_fits():
    image = noise(12, 8)
    np.testing.assert_array_equal(
        np.asarray(pixels.square(image, 8, "lanczos")), np.asarray(image)[:, 2:10]
    )


def test_decode_gives_rgb_for_every_pixel_mode():
    grey = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    rgb = Image.merge("RGB", [Image.fromarray(grey)] * 3)
    wide_grey = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = rgb.quantize(256)
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", (8, 8), 255))
    for image in (rgb, Image.fromarray(grey), wide_grey, palette, alpha, alpha.convert("LA")):
        got = pixels.decode(encoded(image), "x")
        assert got.mode == "RGB"
        np.testing.assert_allclose(np.asarray(got)[..., 1].astype(int), grey, atol=1)
    cmyk = pixels.decode(encoded(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0), "x")
    np.testing.assert_allclose(np.asarray(cmyk)[..., 1].astype(int), grey, atol=12)


def test_decode_lays_transparent_pixels_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (np.asarray(pixels.decode(encoded(clear), "x")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9])
    assert (np.asarray(pixels.decode(encoded(palette, transparency=0), "x")) == 255).all()


def test_decode_turns_an_image_upright_by_its_exif_orientation():
    image = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be rotated 90 degrees clockwise
    got = pixels.decode(encoded(image, exif=exif), "x")
    np.testing.assert_array_equal(np.asarray(got), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("data", [b"", b"no image", encoded(noise(64, 64))[:900]])
def test_decode_names_a_corrupt_image(data):
    with pytest.raises(InputError, match=r"cannot decode image a/b\.png .*replace the file"):
        pixels.decode(data, "a/b.png")


def test_a_map_is_resized_to_the_nearest_pixel_where_its_picture_is_smoothed():
    rows, columns = np.indices((60, 90))
    picture = Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))
    for place in (0.0, 0.3, 1.0):
        geometry = pixels.Geometry(20, "box", place, False)
        image, cut = (geometry.crop_image(picture), geometry.crop_map(columns + 1000 * rows))
        np.testing.assert_allclose(cut % 1000, image[..., 0], atol=0.5)
        np.testing.assert_allclose(cut // 1000, image[..., 1], atol=0.5)
    enlarged = pixels.square_map(np.arange(6).reshape(2, 3), 4)
    np.testing.assert_array_equal(enlarged, [[0, 1, 1, 2]] * 2 + [[3, 4, 4, 5]] * 2)
