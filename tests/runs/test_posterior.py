"""The noise of a first stage's posterior: how large it is, who draws it, what it costs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.data.images import open_images
from ldm_jax.errors import InputError
from ldm_jax.eval import frechet
from ldm_jax.eval.frechet import Moments
from ldm_jax.eval.reconstruction import psnr
from ldm_jax.eval.spectrum import Spectrum, high_frequency_power
from ldm_jax.models import autoencoder
from ldm_jax.runs.first_stage import FirstStage, encode_images, load_first_stage
from ldm_jax.runs.posterior import (
    FRECHET,
    HIGH,
    ORIGINALS,
    SCALES,
    compile_decodes,
    measure_posterior,
    name_of,
    write_posterior,
)
from ldm_jax.runs.reconstruction import reconstruction_figures, spread
from ldm_jax.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.judged import features, judges, one_device  # noqa: F401

NUM = 37
PIXELS = FirstStage(tiny.AUTOENCODER, {}, 3, "")  # by `pixels` its latents are the pixels
SIGMA = 0.005  # by `pixels`, of blue; green has twice and red three times as much


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(2, 4, 1))


@pytest.fixture(scope="module")
def held_out():
    source = open_images(tiny.AUTOENCODER.images, "held_out", augment=False)
    indices = spread(len(source), NUM)
    return indices, source.read(indices, indices)["image"]


@pytest.fixture(scope="module")
def found(first_stage, mesh, judges):  # noqa: F811
    return measure_posterior(load_first_stage(first_stage, mesh), mesh, limit=NUM, lpips=np_lpips)


@pytest.fixture
def pixels(monkeypatch):
    """Means are the pixels at half their contrast, so that none is clipped; decoding keeps them."""

    def encode(config, params, x):
        logvar = jnp.broadcast_to(2 * jnp.log(SIGMA * jnp.array([3.0, 2.0, 1.0])), x.shape)
        return jnp.concatenate([x / 2, logvar], -1)

    monkeypatch.setattr(autoencoder, "encode", encode)
    monkeypatch.setattr(autoencoder, "decode", lambda config, params, z: z)


def np_lpips(a, b):
    return np.abs(a.astype(float) - b).mean((1, 2, 3))


def decoded(mesh, pictures, indices, seed=0, size=8):
    """{k: uint8 [N,H,W,3]}"""
    out = compile_decodes(PIXELS, mesh, seed, size)(pictures, indices)["decoded"]
    return dict(zip(SCALES, np.moveaxis(out, 1, 0), strict=True))


def test_ratios_are_those_of_the_encoders_moments(found, first_stage, mesh, held_out):
    moments = encode_images(load_first_stage(first_stage, mesh), mesh, held_out[1])
    mean, logvar = np.split(moments.astype(np.float64), 2, -1)
    want = np.sqrt(np.exp(logvar).mean((0, 1, 2))) / mean.std((0, 1, 2))
    np.testing.assert_allclose(found.ratios, want, rtol=1e-4)
    assert len(found.ratios) == 2 and found.ratios.std() > 1e-3
    assert found.figures["noise_ratio_max"] == found.ratios.max()
    assert f"(channel {want.argmax()})" in found.verdict


def test_without_noise_it_is_the_reconstruction(found, first_stage):
    want = reconstruction_figures(first_stage, limit=NUM, lpips=np_lpips)
    assert found.num == want.pop("num_images") and found.step == want.pop("step")
    assert {"psnr_db", "sharpness", "lpips"} <= want.keys()
    assert {name: found.decoded[0][name] for name in want} == pytest.approx(want, abs=1e-3)


def test_figures_depend_neither_on_the_batch_nor_on_the_mesh(found, first_stage):
    one = one_device()
    alone = measure_posterior(
        load_first_stage(first_stage, one), one, limit=NUM, lpips=np_lpips, batch_size=20
    )
    assert alone.figures == pytest.approx(found.figures, rel=0.01, abs=1e-3)
    different = np.abs(alone.picture.astype(int) - found.picture)
    assert different.max() <= 1 and different.mean() < 0.01  # rounding


def test_an_image_has_one_noise_that_every_scale_multiplies(pixels, mesh, held_out):
    indices, pictures = held_out
    images = {k: x.astype(float) for k, x in decoded(mesh, pictures, indices).items()}
    noise = images[8] - images[0]
    for k in SCALES:
        np.testing.assert_allclose(images[k] - images[0], noise * k / 8, atol=1.2)
    want = 8 * SIGMA * 127.5 * np.array([3, 2, 1])
    np.testing.assert_allclose(noise.std((0, 1, 2)), want, rtol=0.05)
    pairs = np.corrcoef(noise.reshape(NUM, -1)) - np.eye(NUM)
    assert np.abs(pairs).max() < 0.35  # of 192 values each


def test_the_noise_comes_from_the_seed_and_the_images_index(pixels, mesh, held_out):
    indices, pictures = held_out
    whole = decoded(mesh, pictures, indices)
    part = decoded(mesh, pictures[5:16:2], indices[5:16:2], size=16)
    for k in SCALES:
        np.testing.assert_array_equal(part[k], whole[k][5:16:2])
    other = decoded(mesh, pictures, indices, seed=1)
    np.testing.assert_array_equal(other[0], whole[0])
    assert (other[8] != whole[8]).mean() > 0.5


def test_the_figures_are_of_what_is_decoded(pixels, mesh, judges, held_out):  # noqa: F811
    indices, pictures = held_out
    found = measure_posterior(PIXELS, mesh, limit=NUM, batch_size=16)
    originals = Spectrum.of(pictures)
    moments = Moments.of(features("random-conv", pictures)["quarters"])
    for k, images in decoded(mesh, pictures, indices).items():
        spectrum, figures = Spectrum.of(images), found.decoded[k]
        assert figures["psnr_db"] == pytest.approx(psnr(pictures, images).mean())
        ratio = high_frequency_power(spectrum) / high_frequency_power(originals)
        assert figures[HIGH] == pytest.approx(ratio)
        assert figures["spectrum_distance"] == pytest.approx(spectrum.distance(originals))
        ours = Moments.of(features("random-conv", images)["quarters"])
        assert figures[FRECHET] == pytest.approx(frechet.distance(moments, ours), rel=1e-3)
        np.testing.assert_allclose(found.spectra[name_of(k)].power, spectrum.power)
    np.testing.assert_allclose(found.spectra[ORIGINALS].power, originals.power)
    grey = pictures.astype(float) / 255
    want = SIGMA * np.array([3, 2, 1]) / grey.std((0, 1, 2))
    np.testing.assert_allclose(found.ratios, want, rtol=1e-4)
    # Eight images, spread over all of them; the last row is of k = 8.
    np.testing.assert_array_equal(found.picture[:8, -8:], pictures[-1])
    last = decoded(mesh, pictures, indices)[8][-1]
    np.testing.assert_array_equal(found.picture[-8:, -8:], last)


@pytest.mark.usefixtures("pixels", "judges")
def test_too_few_images_have_a_distance_only_on_demand(mesh, capsys):
    found = measure_posterior(PIXELS, mesh, limit=6)
    assert FRECHET not in found.decoded[1] and "psnr_db" in found.decoded[1]
    assert "6 images for 6 features; --allow-few" in capsys.readouterr().err
    found = measure_posterior(PIXELS, mesh, limit=6, allow_few=True)
    assert found.decoded[1][FRECHET] > 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("latent", ["vq", "identity"])
def test_a_latent_without_spread_is_refused(latent, mesh):
    changes = {"latent": latent}
    if latent == "identity":
        changes |= {"width_multipliers": (1,), "latent_channels": 3}
    model = dataclasses.replace(tiny.AUTOENCODER.model, **changes)
    run = dataclasses.replace(tiny.AUTOENCODER, model=model)
    with pytest.raises(InputError, match=rf"'{latent}' has no posterior .* points; .*'kl'"):
        measure_posterior(FirstStage(run, {}, 0, ""), mesh)


def test_the_report_shows_every_scale(found, tmp_path):
    path = write_posterior(found, tmp_path, "ldm evaluate --posterior")
    page = path.read_text()
    assert path == tmp_path / "posterior.html"
    titles = ("Latent channels", "Decoded", "Images", "Curves", "Commands")
    assert [page.index(f"<h2>{title}</h2>") for title in titles] == sorted(
        page.index(f"<h2>{title}</h2>") for title in titles
    )
    assert page.count("<svg") == 4 and page.count(name_of(2)) == 2  # in the table and the legend
    assert "no data" not in page and f"{found.ratios[1]:.4g}" in page


def test_a_channel_that_never_changes_has_an_infinite_ratio(found):
    dead = dataclasses.replace(found, mean_std=np.array([0.0, 1.0]))
    with np.errstate(divide="raise"):
        assert dead.ratios[0] == np.inf
    assert "(channel 0)" in dead.verdict
