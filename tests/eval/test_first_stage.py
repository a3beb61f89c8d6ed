import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import reconstruction
from ldm_jax.eval.first_stage import measure


def pictures(count, side=16, seed=0):
    """Smooth random images of different slopes."""
    x = np.random.default_rng(seed).normal(size=(count, side, side, 3)).cumsum(1).cumsum(2)
    x *= np.linspace(1, 3, count)[:, None, None, None]
    return np.round(np.clip(128 + 4 * x, 0, 255)).astype(np.uint8)


def blur(images):
    """Each pixel averaged with its left neighbour."""
    x = images.astype(np.float64)
    return np.round((x + np.roll(x, 1, 2)) / 2).astype(np.uint8)


def same(images):
    return images


def test_figures_do_not_depend_on_the_batches():
    images = pictures(11)

    def lpips(x, y):
        return np.abs(x.astype(float) - y).mean((1, 2, 3))

    whole = measure(blur, [images], lpips=lpips)
    parts = measure(blur, [images[:3], images[3:4], images[4:]], lpips=lpips)
    assert set(whole) == {*("psnr_db", "psnr_db_std", "ssim", "sharpness", "lpips", "num_images")}
    assert parts == pytest.approx(whole, rel=1e-9)
    assert whole["num_images"] == 11


def test_an_exact_reconstruction_has_the_best_of_every_figure():
    figures = measure(same, [pictures(4)], lpips=lambda x, y: x[:, 0, 0, 0] - y[:, 0, 0, 0])
    assert figures["psnr_db"] == 100 and figures["psnr_db_std"] == 0 and figures["sharpness"] == 1
    assert figures["ssim"] == pytest.approx(1, abs=1e-12) and figures["lpips"] == 0


def test_each_figure_is_its_measure_over_all_images():
    a = pictures(5)
    b = blur(a)
    got = measure(blur, [a[:2], a[2:]], lpips=lambda x, y: 1.0 * x[:, 1, 1, 0])
    psnr = reconstruction.psnr(a, b)
    assert got["psnr_db"] == pytest.approx(psnr.mean()) and psnr.std() > 0.1
    assert got["psnr_db_std"] == pytest.approx(psnr.std())
    assert got["ssim"] == pytest.approx(reconstruction.ssim(a, b).mean())
    slopes = [reconstruction.gradient_magnitude(x) for x in (a, b)]
    assert got["sharpness"] == pytest.approx(slopes[1].sum() / slopes[0].sum())
    assert abs(got["sharpness"] - (slopes[1] / slopes[0]).mean()) > 1e-3
    assert got["sharpness"] < 0.95
    assert got["lpips"] == pytest.approx(a[:, 1, 1, 0].mean())


def test_small_or_flat_images_have_the_figures_that_they_can_have():
    figures = measure(blur, [pictures(3, side=10)])
    assert "ssim" not in figures and np.isfinite(figures["sharpness"])
    assert "ssim" in measure(blur, [pictures(3, side=11)])
    with np.errstate(all="raise"):
        assert np.isnan(measure(same, [np.zeros((2, 12, 12, 3), np.uint8)])["sharpness"])


def test_no_images_are_refused():
    with pytest.raises(InputError, match="at least one"):
        measure(same, [])
