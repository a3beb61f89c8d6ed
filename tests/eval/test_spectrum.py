"""Radial power spectra of images: where power lies and what it adds up to."""

import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval.spectrum import CUT, Spectrum, high_frequency_power

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (70, 16, 16, 3), np.uint8)


def wave(across, down, side=32, amplitude=100):
    y, x = np.mgrid[:side, :side] / side
    values = 128 + amplitude * np.cos(2 * np.pi * (across * x + down * y) + 0.3)
    return np.repeat(values.round().astype(np.uint8)[None, ..., None], 3, -1)


@pytest.mark.parametrize("waves", [(3, 0), (0, 5), (6, 8), (16, 0), (-4, 3), (6, 5)])
def test_a_wave_lies_in_the_ring_of_its_frequency(waves):
    spectrum = Spectrum.of(wave(*waves))
    variance = spectrum.modes * spectrum.power
    assert spectrum.frequency[variance.argmax()] == round(np.hypot(*waves)) / 32
    assert variance.max() > 0.999 * variance.sum()


def test_a_wave_has_half_its_squared_amplitude():
    spectrum = Spectrum.of(wave(6, 8))
    assert (spectrum.modes * spectrum.power).max() == pytest.approx(100**2 / 2, rel=1e-2)


@pytest.mark.parametrize("shape", [(16, 16), (15, 15), (8, 24), (24, 7), (2, 2)])
def test_rings_add_up_to_the_variance(shape):
    images = RNG.integers(0, 256, (5, *shape, 3), np.uint8)
    spectrum = Spectrum.of(images)
    assert spectrum.modes.sum() == shape[0] * shape[1] - 1
    variance = images.astype(float).var((1, 2)).mean()
    assert spectrum.modes @ spectrum.power == pytest.approx(variance, rel=1e-12)


def test_white_noise_is_flat():
    spectrum = Spectrum.of(NOISE)
    flat = (256**2 - 1) / 12 / 16**2
    # 70 images of 3 channels; a ring's modes come in pairs.
    error = flat / np.sqrt(70 * 3 * spectrum.modes / 2)
    assert (np.abs(spectrum.power - flat) < 4 * error).all()


def test_blur_takes_high_frequencies_away_and_noise_adds_them():
    smooth = sum(np.roll(NOISE.astype(int), s, a) for s in range(3) for a in (1, 2)) // 6
    grainy = np.clip(smooth + RNG.normal(0, 20, smooth.shape), 0, 255).round()
    blurred = sum(np.roll(smooth, s, a) for s in range(2) for a in (1, 2)) // 4
    power = [
        high_frequency_power(Spectrum.of(x.astype(np.uint8))) for x in (blurred, smooth, grainy)
    ]
    assert power[0] < 0.8 * power[1] and power[2] > 1.2 * power[1]


def test_the_cut_divides_the_variance():
    spectrum = Spectrum.of(NOISE)
    variance = NOISE.astype(float).var((1, 2)).mean()
    assert high_frequency_power(spectrum, 0.0) == pytest.approx(variance)
    assert high_frequency_power(spectrum, 1.0) == 0
    low = Spectrum.of(wave(8, 0))  # at the cut itself
    assert low.frequency[7] == CUT and high_frequency_power(low) < 0.1
    assert high_frequency_power(Spectrum.of(wave(9, 0))) > 4990


def test_parts_merge_to_the_whole():
    whole, merged = Spectrum.of(NOISE), Spectrum.of(NOISE[:7]).merge(Spectrum.of(NOISE[7:]))
    np.testing.assert_allclose(merged.power, whole.power, rtol=1e-12)
    assert merged.num == whole.num == 70


def test_distance_is_the_mean_log_ratio():
    a = Spectrum.of(NOISE)
    assert a.distance(a) == 0
    half = Spectrum.of(NOISE // 2)  # rounded down: a little noise beside
    assert half.distance(a) == a.distance(half) == pytest.approx(np.log(4), abs=0.01)


def test_distance_of_flat_images_is_finite():
    flat = Spectrum.of(np.full((1, 16, 16, 3), 7, np.uint8))
    assert flat.distance(flat) == 0 and 0 < flat.distance(Spectrum.of(NOISE)) < np.inf


def test_images_that_have_no_common_spectrum_are_refused():
    a = Spectrum.of(NOISE)
    with pytest.raises(InputError, match="of 256 and 64 pixels"):
        a.merge(Spectrum.of(NOISE[:, :8, :8]))
    with pytest.raises(InputError, match="of one size"):
        a.distance(Spectrum.of(NOISE[:, :8, :8]))
    with pytest.raises(InputError, match="0 images"):
        Spectrum.of(NOISE[:0])
    with pytest.raises(InputError, match=r"uint8 \[N,H,W,3\]"):
        Spectrum.of(NOISE / 255)
