"""Laws of the timestep draw and of the denoising loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise_levels import uniform_timesteps
from ldm_jax.diffusion.objective import LOSSES, denoising_loss
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for

PROCESS = make_process(ProcessConfig())
T = jnp.array([0, 300, 999], jnp.int32)
Z0 = jax.random.normal(key_for(0, "z0"), (3, 8, 8, 16))
NOISE = jax.random.normal(key_for(0, "noise"), (3, 8, 8, 16))


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_the_true_noise_is_zero(loss):
    value = denoising_loss(lambda z_t, t, cond: NOISE, PROCESS, Z0, None, T, NOISE, loss)
    np.testing.assert_array_equal(value, np.zeros(3))


@pytest.mark.parametrize(("loss", "expected"), [("l2", 1.0), ("l1", (2 / np.pi) ** 0.5)])
def test_loss_of_the_zero_predictor_is_the_moment_of_a_normal(loss, expected):
    value = denoising_loss(lambda z_t, t, cond: 0 * z_t, PROCESS, Z0, None, T, NOISE, loss)
    np.testing.assert_allclose(value, np.full(3, expected), rtol=0.15)


@pytest.mark.parametrize(("loss", "penalty"), [("l2", np.square), ("l1", np.abs)])
def test_loss_equals_the_formula_written_by_hand(loss, penalty):
    cond = {"shift": jnp.array([0.5, -1.0, 2.0])}

    def denoiser(z_t, t, cond):
        return z_t * (t.reshape(3, 1, 1, 1) / 1000) + cond["shift"].reshape(3, 1, 1, 1)

    value = denoising_loss(denoiser, PROCESS, Z0, cond, T, NOISE, loss)
    z0, noise, shift = (np.asarray(a, np.float64) for a in (Z0, NOISE, cond["shift"]))
    for row, t in enumerate([0, 300, 999]):
        alpha_bar = PROCESS.alpha_bar[t]
        z_t = alpha_bar**0.5 * z0[row] + (1 - alpha_bar) ** 0.5 * noise[row]
        expected = penalty(z_t * t / 1000 + shift[row] - noise[row]).mean()
        assert value[row] == pytest.approx(expected, rel=1e-5)


def test_loss_is_f32_when_the_denoiser_answers_in_bf16():
    value = denoising_loss(
        lambda z_t, t, cond: NOISE.astype(jnp.bfloat16), PROCESS, Z0, None, T, NOISE
    )
    assert value.dtype == jnp.float32
    rounding = np.asarray(NOISE.astype(jnp.bfloat16), np.float64) - np.asarray(NOISE, np.float64)
    np.testing.assert_allclose(value, np.square(rounding).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_loss_refuses_a_prediction_that_would_broadcast():
    with pytest.raises(AssertionError, match=r"\(3, 8, 8, 1\)"):
        denoising_loss(lambda z_t, t, cond: z_t[..., :1], PROCESS, Z0, None, T, NOISE)


def test_loss_refuses_an_unknown_name():
    with pytest.raises(InputError, match=r"'huber'.*l1.*l2"):
        denoising_loss(lambda z_t, t, cond: z_t, PROCESS, Z0, None, T, NOISE, "huber")


def test_timesteps_are_uniform():
    count, bins = 20_000, 20
    t = uniform_timesteps(example_keys(key_for(0, "t"), jnp.arange(count)), 1000)
    assert t.dtype == jnp.int32
    assert t.min() == 0
    assert t.max() == 999
    observed = np.bincount(np.asarray(t) * bins // 1000, minlength=bins)
    chi_square = np.sum((observed - count / bins) ** 2 / (count / bins))
    assert chi_square < 43.8  # the 99.9 % point of 19 degrees of freedom


def test_timesteps_depend_on_their_own_key_only():
    key = key_for(0, "t")
    whole = uniform_timesteps(example_keys(key, jnp.arange(64)), 1000)
    some = np.array([63, 7, 8])
    np.testing.assert_array_equal(uniform_timesteps(example_keys(key, some), 1000), whole[some])
