import numpy as np
import pytest
from skimage.metrics import structural_similarity

from ldm_jax.errors import InputError
from ldm_jax.eval.reconstruction import gradient_magnitude, psnr, ssim


def pictures(seed, shape=(3, 24, 20, 3)):
    """Smooth random images, so that windows differ in mean and in variance."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).cumsum(1).cumsum(2)
    x = (x - x.min()) / (x.max() - x.min())
    return np.round(255 * x).astype(np.uint8)


def test_ssim_equals_the_reference_implementation():
    a = pictures(0)
    noise = np.random.default_rng(1).normal(0, [[[[5]]], [[[20]]], [[[60]]]], a.shape)
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    # Its mean, too, leaves out the border of half a window.
    expected = [
        structural_similarity(
            one,
            other,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=-1,
            data_range=255,
        )
        for one, other in zip(a, b, strict=True)
    ]
    assert expected[0] - expected[2] > 0.1
    np.testing.assert_allclose(ssim(a, b), expected, atol=1e-9)


def test_ssim_is_symmetric_and_one_for_identical_images():
    a, b = pictures(0), pictures(1)
    np.testing.assert_allclose(ssim(a, a), 1.0, atol=1e-12)
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), atol=1e-12)


def test_psnr_is_the_closed_form_per_image():
    a = np.full((2, 8, 8, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 1
    b[1, :4] += 10
    np.testing.assert_allclose(
        psnr(a, b), [20 * np.log10(255), 10 * np.log10(255**2 / 50)], rtol=1e-12
    )


def test_psnr_does_not_wrap_around_when_the_difference_is_negative():
    dark, light = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    np.testing.assert_allclose(psnr(dark, light), 0.0, atol=1e-12)


def test_psnr_is_capped_when_images_are_identical():
    a = pictures(0)
    np.testing.assert_array_equal(psnr(a, a), 100.0)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_floats_and_unequal_shapes_are_refused(measure):
    a = pictures(0)
    with pytest.raises(InputError, match="round to uint8"):
        measure(a / 255.0, a / 255.0)
    with pytest.raises(InputError, match="one shape"):
        measure(a, a[:, 1:])


def test_ssim_refuses_images_below_its_window():
    a = pictures(0, (1, 10, 32, 3))
    with pytest.raises(InputError, match="at least 11"):
        ssim(a, a)


def test_gradient_magnitude_is_the_slope_of_a_ramp_in_any_direction():
    rows, columns = np.indices((12, 16))
    ramps = [3 * columns, 4 * rows, 3 * columns + 4 * rows, 200 - 3 * columns, 0 * rows]
    ramps = np.stack(ramps)[..., None].repeat(3, -1).astype(np.uint8)
    np.testing.assert_allclose(gradient_magnitude(ramps), [3, 4, 5, 3, 0], rtol=1e-12)


def test_gradient_magnitude_falls_when_an_image_is_blurred():
    a = pictures(0)
    blurred = np.round((a[:, 1:].astype(float) + a[:, :-1]) / 2).astype(np.uint8)
    assert (gradient_magnitude(blurred) < 0.95 * gradient_magnitude(a)).all()


def test_gradient_magnitude_refuses_floats_and_single_rows():
    with pytest.raises(InputError, match="round to uint8"):
        gradient_magnitude(pictures(0) / 255.0)
    with pytest.raises(InputError, match="at least 2 pixels"):
        gradient_magnitude(pictures(0)[:, :1])
