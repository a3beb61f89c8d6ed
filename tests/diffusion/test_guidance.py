"""Laws of classifier-free guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.diffusion.samplers import ddim
from ldm_jax.keys import example_keys, key_for

Z_T = jax.random.normal(key_for(0, "z_T"), (3, 4, 4, 2))
T = jnp.array([10, 500, 990], jnp.int32)
COND = {"label": jnp.array([0, 1, 2], jnp.int32), "shift": jnp.array([[0.3], [0.7], [-1.1]])}
NULL = {"label": 3, "shift": jnp.array([[0.1]])}
TABLE = jnp.array([0.37, -1.3, 2.1, 0.9])


def denoiser(z_t, t, cond):
    rows = (len(z_t), 1, 1, 1)
    gain = TABLE[cond["label"]].reshape(rows) + t.reshape(rows) / 1000
    return jnp.tanh(z_t * gain) + cond["shift"].reshape(rows)


def conditional():
    return denoiser(Z_T, T, COND)


def unconditional():
    null = {"label": jnp.full((3,), 3), "shift": jnp.full((3, 1), 0.1)}
    return denoiser(Z_T, T, null)


@pytest.mark.parametrize("scale", [1.0, jnp.float32(1)])
def test_scale_one_is_the_conditional_model_bit_for_bit(scale):
    guided = classifier_free(denoiser, scale, NULL)(Z_T, T, COND)
    np.testing.assert_array_equal(guided, conditional())


def test_scale_zero_is_the_unconditional_model():
    guided = classifier_free(denoiser, 0.0, NULL)(Z_T, T, COND)
    np.testing.assert_array_equal(guided, unconditional())


@pytest.mark.parametrize("scale", [-0.5, 0.5, 1.5, 5.0])
def test_prediction_is_linear_in_scale(scale):
    guided = classifier_free(denoiser, scale, NULL)(Z_T, T, COND)
    null, cond = np.float64(unconditional()), np.float64(conditional())
    np.testing.assert_allclose(guided, (1 - scale) * null + scale * cond, rtol=0, atol=2e-6)


def test_both_predictions_come_from_one_call_null_half_first():
    calls = []

    def recorded(z_t, t, cond):
        calls.append((z_t, t, cond))
        return denoiser(z_t, t, cond)

    classifier_free(recorded, 2.0, NULL)(Z_T, T, COND)
    ((z_t, t, cond),) = calls
    np.testing.assert_array_equal(z_t, np.concatenate([Z_T, Z_T]))
    np.testing.assert_array_equal(t, [10, 500, 990, 10, 500, 990])
    np.testing.assert_array_equal(cond["label"], [3, 3, 3, 0, 1, 2])
    assert cond["label"].dtype == jnp.int32
    np.testing.assert_allclose(cond["shift"][:, 0], [0.1, 0.1, 0.1, 0.3, 0.7, -1.1], rtol=1e-6)


def test_sampling_compiles_once_for_every_scale_and_key():
    traces = []
    process = make_process(ProcessConfig())
    grid = make_grid(process, 5)

    def counted(z_t, t, cond):
        traces.append(z_t.shape)
        return denoiser(z_t, t, cond)

    @jax.jit
    def sample(scale, keys):
        guided = predictor(process, "eps", classifier_free(counted, scale, NULL))
        return ddim(guided, grid, Z_T, COND, keys, eta=0.5)

    def keys(seed):
        return example_keys(key_for(seed, "sampler"), jnp.arange(3))

    first = sample(1.0, keys(0))
    others = [sample(4.0, keys(0)), sample(1.0, keys(1)), sample(2.5, keys(2))]
    assert len(traces) == 1
    assert all(jnp.any(jnp.abs(other - first) > 1e-3) for other in others)
