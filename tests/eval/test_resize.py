"""The named resizes keep the laws of their grids, and those that PIL and jax have are theirs."""

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.eval.resize import RESIZES

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 37, 3), np.uint8)
SIDES = [17, 61]  # smaller and larger
COMPILED = {name: jax.jit(function, static_argnums=1) for name, function in RESIZES.items()}


@pytest.mark.parametrize("name", RESIZES)
def test_every_resize_keeps_constants_and_images_of_the_right_size(name):
    function = COMPILED[name]
    square = IMAGES[:, :24, :24]
    np.testing.assert_allclose(function(square, 24), square, rtol=0, atol=1e-4)
    for side in SIDES:
        flat = function(np.full_like(IMAGES, 77), side)
        assert flat.shape == (2, side, side, 3)
        assert flat.dtype == np.float32
        np.testing.assert_allclose(flat, 77.0, rtol=1e-6)


@pytest.mark.parametrize("name", sorted({*RESIZES} - {"tf1_bilinear"}))
def test_mirroring_commutes_with_every_resize_but_that_of_tensorflow(name):
    mirrored = COMPILED[name](IMAGES[:, :, ::-1], 61)
    np.testing.assert_allclose(mirrored, COMPILED[name](IMAGES, 61)[:, :, ::-1], rtol=0, atol=1e-2)
    anchored = COMPILED["tf1_bilinear"](IMAGES[:, :, ::-1], 61)
    assert np.abs(anchored - COMPILED["tf1_bilinear"](IMAGES, 61)[:, :, ::-1]).mean() > 5


@pytest.mark.parametrize("side", SIDES)
def test_the_grid_of_tensorflow_is_anchored_at_the_corner(side):
    """A ramp is met where target * in / out lies, and held at the last pixel."""
    ramp = np.broadcast_to(np.arange(37, dtype=np.float32)[None, None, :, None], (1, 24, 37, 3))
    expected = np.minimum(np.arange(side) * 37 / side, 36)
    for row in np.asarray(COMPILED["tf1_bilinear"](ramp, side))[0, :, :, 0]:
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)
    half_pixel = np.clip((np.arange(side) + 0.5) * 37 / side - 0.5, 0, 36)
    for row in np.asarray(COMPILED["torch_bilinear"](ramp, side))[0, :, :, 0]:
        np.testing.assert_allclose(row, half_pixel, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["tf1_bilinear", "torch_bilinear"])
def test_compiling_changes_no_bit_of_the_bilinear_ones(name):
    """Joined products and sums would round once instead of twice, as no reference does."""
    np.testing.assert_array_equal(COMPILED[name](IMAGES, 61), RESIZES[name](IMAGES, 61))


@pytest.mark.parametrize("side", SIDES)
def test_bicubic_is_that_of_pil_in_floating_point(side):
    planes = [[Image.fromarray(i[..., c].astype(np.float32)) for c in range(3)] for i in IMAGES]
    pil = [[p.resize((side, side), Image.Resampling.BICUBIC) for p in image] for image in planes]
    pil = np.array([np.stack([np.asarray(p) for p in image], -1) for image in pil])
    assert (pil.min() < 0 < 255 < pil.max()) == (side > 37)  # noise that grows shows clipping
    clipped, ours = (
        COMPILED["pil_bicubic"](IMAGES, side),
        COMPILED["torch_bicubic_aa"](IMAGES, side),
    )
    np.testing.assert_allclose(clipped, np.clip(pil, 0, 255), rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours, pil, rtol=0, atol=2e-4)
    of_jax = jax.image.resize(IMAGES.astype(np.float32), (2, side, side, 3), "bicubic")
    np.testing.assert_allclose(ours, of_jax, rtol=0, atol=2e-2)
