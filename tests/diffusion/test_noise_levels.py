"""Laws of the draws of noise levels: their densities, the shift, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise_levels import (
    DRAWS,
    NoiseLevels,
    check,
    draw_times,
    quantile_times,
    shifted,
)
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for

FLOW = make_process(ProcessConfig("flow"))


def keys(first=0, last=20_000):
    return example_keys(key_for(0, "t"), jnp.arange(first, last))


def quantiles(config, process=FLOW):
    return np.quantile(draw_times(process, config, keys()), [0.1, 0.5, 0.9])


def test_logit_normal_has_its_quantiles():
    expected = 1 / (1 + np.exp(-(0.5 + 0.8 * np.array([-1.2816, 0, 1.2816]))))
    got = quantiles(NoiseLevels("logit_normal", 0.5, 0.8))
    np.testing.assert_allclose(got, expected, atol=0.01)


def test_log_normal_has_its_quantiles():
    expected = np.exp(-1.2 + 1.2 * np.array([-1.2816, 0, 1.2816]))
    got = quantiles(NoiseLevels("log_normal", -1.2, 1.2), make_process(ProcessConfig("edm")))
    np.testing.assert_allclose(got, expected, rtol=0.05)


def test_mode_is_uniform_at_scale_zero_and_favours_the_middle_above():
    np.testing.assert_allclose(
        quantiles(NoiseLevels("mode", mode_scale=0.0)), [0.1, 0.5, 0.9], atol=0.015
    )
    narrow = quantiles(NoiseLevels("mode"))
    assert 0.15 < narrow[0] < 0.5 < narrow[2] < 0.85


def test_uniform_on_edm_is_uniform_in_the_logarithm():
    process = make_process(ProcessConfig("edm", sigma_min=0.01, sigma_max=100.0))
    np.testing.assert_allclose(
        np.log10(quantiles(NoiseLevels(), process)), [-1.6, 0, 1.6], atol=0.06
    )


def test_shift_moves_to_noise_keeps_the_ends_and_is_undone_by_its_inverse():
    t = np.linspace(0, 1, 11)
    moved = shifted(t, 3.0)
    assert (moved[0], moved[-1]) == (0, 1) and np.all(moved[1:-1] > t[1:-1])
    np.testing.assert_allclose(shifted(moved, 1 / 3), t, atol=1e-15)
    # It multiplies sigma / alpha by 3, which is what SD3 asks of it.
    moved, t = moved[1:-1], t[1:-1]
    np.testing.assert_allclose(moved / (1 - moved), 3 * t / (1 - t))
    np.testing.assert_allclose(
        quantiles(NoiseLevels(shift=3.0)), shifted(np.array([0.1, 0.5, 0.9]), 3.0), atol=0.015
    )


@pytest.mark.parametrize("draw", [d for d in DRAWS if d != "log_normal"])
def test_timesteps_are_those_of_the_continuous_draw(draw):
    discrete, config = make_process(ProcessConfig(num_timesteps=50)), NoiseLevels(draw)
    t = draw_times(discrete, config, keys())
    assert t.dtype == jnp.int32 and t.min() >= 0 and t.max() <= 49
    np.testing.assert_allclose(
        np.mean(t + 0.5) / 50, np.mean(draw_times(FLOW, config, keys())), atol=0.01
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_even_quantiles_have_the_distribution_of_the_draws(draw):
    process = make_process(ProcessConfig("edm" if draw == "log_normal" else "flow"))
    config = NoiseLevels(draw, mean=0.3, std=0.8, shift=1.0 if draw == "log_normal" else 2.0)
    u = (jnp.arange(1000) + 0.5) / 1000
    got = np.quantile(quantile_times(process, config, u), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(got, quantiles(config, process), rtol=0.03)


@pytest.mark.parametrize("draw", DRAWS)
def test_time_depends_on_its_own_key_only(draw):
    process = make_process(ProcessConfig("edm" if draw == "log_normal" else "flow"))
    whole = draw_times(process, NoiseLevels(draw), keys(0, 8))
    np.testing.assert_array_equal(draw_times(process, NoiseLevels(draw), keys(3, 5)), whole[3:5])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"draw": "normal"}, "draw 'normal' is unknown"),
        ({"std": 0.0}, "std 0.0 must be above 0; SD3"),
        ({"mode_scale": 2.0}, "mode_scale 2.0 must be"),
        ({"shift": 0.0}, "shift 0.0 must be above 0"),
        ({"draw": "log_normal"}, "'log_normal'.*not 'flow'"),
    ],
)
def test_noise_levels_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        check(FLOW, NoiseLevels(**fields))


def test_a_draw_compiles_to_the_same_numbers():
    config = NoiseLevels("logit_normal", shift=2.0)
    jitted = jax.jit(lambda keys: draw_times(FLOW, config, keys))
    np.testing.assert_allclose(jitted(keys(0, 4)), draw_times(FLOW, config, keys(0, 4)), rtol=1e-6)
