"""The ways of an experiment's samples: what is refused, and spectra against the reals'."""

import dataclasses

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.image_sets import ImageStream
from ldm_jax.eval.spectrum import Spectrum
from ldm_jax.runs.plan import Arm
from ldm_jax.sampling import ways
from tests import tiny

ARMS = {
    "mean": Arm(dataclasses.replace(tiny.DENOISER, codec="mean"), tiny.AUTOENCODER),
    "sample": Arm(tiny.DENOISER, tiny.AUTOENCODER),
}
TWO = {"steps": 2, "num": 16}


def noise(num, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, side, side, 3), np.uint8)


def test_one_list_is_of_all_arms():
    found = ways.read_ways({"samples": [TWO, TWO | {"weights": "ema"}]}, ARMS)
    assert found["mean"] == found["sample"]
    assert [way.weights for way in found["mean"]] == ["auto", "ema"]


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([TWO | {"decode": "resampled"}], "arm 'mean': .*decode.*resampled"),
        ([TWO | {"weights": "ema-0.5"}], "arm 'mean': weights 'ema-0.5' is unknown"),
        ([TWO, TWO | {"seed": 1}], "arm 'mean': its samples differ in seed"),
        ([TWO, TWO], "arm 'mean': its samples name one way twice"),
        ({"mean": [TWO], "sample": [TWO | {"num": 32}]}, "arm 'sample': .* num 32, others 16"),
        ({"mean": [TWO]}, r"samples are of \['mean'\], arms are"),
    ],
)
def test_ways_that_no_arm_can_be_sampled_in_are_refused(samples, words):
    with pytest.raises(InputError, match=words):
        ways.read_ways({"samples": samples}, ARMS)


def test_spectra_of_blocks_are_those_of_all_images(monkeypatch):
    monkeypatch.setattr(ways, "READ", 3)
    images = noise(8)
    found = ways.spectrum_of(ImageStream(8, lambda rows: images.__getitem__, "noise", "x"))
    expected = Spectrum.of(images)
    np.testing.assert_allclose(found.power, expected.power, rtol=1e-12)
    assert found.num == 8


def test_figures_against_the_reals():
    reals = Spectrum.of(noise(8))
    row = ways.against(reals, reals)
    assert (row["high_frequency_ratio"], row["spectrum_distance"]) == (1.0, 0.0)
    np.testing.assert_array_equal(row["spectrum"], reals.power)
    halved = Spectrum.of((noise(8) // 2).astype(np.uint8))
    assert ways.against(halved, reals)["high_frequency_ratio"] == pytest.approx(0.25, rel=0.02)
    assert ways.against(halved, reals)["spectrum_distance"] == pytest.approx(np.log(4), rel=0.05)


def test_images_of_another_size_have_a_spectrum_and_no_figures():
    row = ways.against(Spectrum.of(noise(2, 16)), Spectrum.of(noise(2)))
    assert set(row) == {"frequency", "spectrum"}


def test_reals_without_high_frequencies_have_no_ratio():
    row = ways.against(Spectrum.of(noise(2)), Spectrum.of(np.full((2, 8, 8, 3), 7, np.uint8)))
    assert "high_frequency_ratio" not in row and np.isfinite(row["spectrum_distance"])
