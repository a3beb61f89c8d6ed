"""Laws of learned variances: their range, the least bound, and whom its gradient reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.learned_variance import hybrid_vlb, log_variance, posterior, split
from ldm_jax.diffusion.process import ProcessConfig, corrupt, make_process
from ldm_jax.keys import key_for

PROCESS = make_process(ProcessConfig("ddpm_linear", 1000, 1e-4, 0.02))
T = jnp.array([1, 5, 20])
SHAPE = (3, 2, 2, 2)
Z0, NOISE = (jax.random.normal(key_for(0, name), SHAPE) for name in ("z0", "noise"))


def test_variance_lies_between_the_posterior_and_beta():
    alpha_bar = PROCESS.alpha_bar
    t = np.asarray(T)
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    low = beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    for v, expected in ((-1.0, low), (1.0, beta), (0.0, np.sqrt(low * beta))):
        got = np.exp(log_variance(PROCESS, jnp.full(SHAPE, v), T))[:, 0, 0, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_bound_is_zero_for_the_truth_and_positive_elsewhere():
    z_t = corrupt(PROCESS, Z0, NOISE, T)
    truth = hybrid_vlb(PROCESS, Z0, z_t, NOISE, -jnp.ones(SHAPE), T)
    np.testing.assert_allclose(truth, 0, atol=2e-4)
    for eps, v in ((NOISE + 0.5, -1.0), (NOISE, 0.0)):
        assert np.all(hybrid_vlb(PROCESS, Z0, z_t, eps, jnp.full(SHAPE, v), T) > truth + 1e-6)


def test_bound_at_the_data_end_is_the_density_of_a_normal():
    t = jnp.zeros(3, jnp.int32)
    z_t, v = corrupt(PROCESS, Z0, NOISE, t), jnp.full(SHAPE, 0.3)
    mean, log_var = (np.float64(x) for x in (Z0, log_variance(PROCESS, v, t)))
    value = hybrid_vlb(PROCESS, Z0, z_t, NOISE, v, t)
    np.testing.assert_allclose(posterior(PROCESS, Z0, z_t, t), mean, atol=1e-6)
    expected = (np.log(2 * np.pi) + log_var).mean(axis=(1, 2, 3)) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-2)


def test_gradient_reaches_the_variance_alone():
    z_t = corrupt(PROCESS, Z0, NOISE, T)
    bound = lambda eps, v: hybrid_vlb(PROCESS, Z0, z_t, eps, v, T).sum()  # noqa: E731
    of_eps, of_v = jax.grad(bound, argnums=(0, 1))(NOISE + 0.1, jnp.zeros(SHAPE))
    assert not np.any(of_eps) and np.all(of_v != 0)


@pytest.mark.parametrize("channels", [2, 6])
def test_prediction_is_noise_then_variance(channels):
    both = jnp.arange(channels).reshape(1, 1, 1, -1)
    eps, v = split(both)
    np.testing.assert_array_equal(jnp.concatenate([eps, v], axis=-1), both)
    assert eps.shape[-1] == channels // 2
