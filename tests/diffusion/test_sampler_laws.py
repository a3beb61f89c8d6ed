"""What holds for every sampler: inpainting, frames, temperature, compiling once, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.diffusion.samplers import SAMPLERS, Known, loop, options
from ldm_jax.keys import example_keys, key_for

PROCESS = make_process(ProcessConfig())
HOME = {  # processes of samplers that refuse timesteps
    "sde_flow": (make_process(ProcessConfig("flow")), "v"),
    "edm": (make_process(ProcessConfig("edm")), "v"),
}
SHAPE = (2, 4, 4, 2)
Z_T = jax.random.normal(key_for(0, "z_T"), SHAPE)
STOCHASTIC = [name for name in SAMPLERS if "temperature" in options(name)]


def keys_of(indices):
    return example_keys(key_for(0, "sampler"), jnp.asarray(indices))


def nonlinear(z_t, t, cond):
    return 0.6 * jnp.tanh(z_t) + 0.4 * jnp.sin(t / 150).reshape(-1, 1, 1, 1)


def sampler(name, num_steps=4, watch=None):
    """(noise, keys, **options) -> what a sampler returns where it is at home; noise if it has any.

    `watch` is a list that takes each predicted x0, outside of jit.
    """
    process, parameterisation = HOME.get(name, (PROCESS, "eps"))
    predict = predictor(process, parameterisation, nonlinear)
    grid = make_grid(process, num_steps)
    fixed = {"eta": 1.0} if "eta" in options(name) else {}

    def watched(z_t, t, cond):
        x0, eps = predict(z_t, t, cond)
        watch.append(x0)
        return x0, eps

    denoise = predict if watch is None else watched

    def run(noise, keys, **options):
        start = grid.start(noise)
        return SAMPLERS[name](denoise, grid, start, None, keys, **fixed, **options)

    return run


def exact(name, watch=None, **options):
    """What it makes of Z_T, operation by operation: programs that differ in an option round alike.

    Compiled as one, XLA fuses them in different ways.
    """
    with jax.disable_jit():
        return jax.tree.map(np.asarray, sampler(name, watch=watch)(Z_T, keys_of([0, 1]), **options))


plain = functools.cache(exact)


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_seed_does_not_compile_anew(name):
    run = jax.jit(sampler(name))
    z0, other = run(Z_T, keys_of([0, 1])), run(Z_T, keys_of([3, 4]))
    assert run._cache_size() == 1
    assert (np.abs(z0 - other).max() > 1e-3) == (name in STOCHASTIC)
    np.testing.assert_allclose(z0, plain(name), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_values_are_kept_and_the_rest_is_sampled(name):
    z0 = 5 + jax.random.normal(key_for(0, "known"), SHAPE)
    mask = np.zeros((1, 4, 4, 1), np.float32)
    mask[:, :2] = 1
    some = exact(name, known=Known(z0, mask))
    np.testing.assert_array_equal(some[:, :2], z0[:, :2])
    # The denoiser looks at no neighbour: nothing of what is known reaches the rest.
    np.testing.assert_array_equal(some[:, 2:], plain(name)[:, 2:])
    np.testing.assert_array_equal(exact(name, known=Known(z0, 0 * mask)), plain(name))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_no_noise_is_used_twice(monkeypatch, name):
    draws, step_noise = [], loop.step_noise

    def noted(*arguments, **options):
        draws.append(np.asarray(step_noise(*arguments, **options)))
        return draws[-1]

    monkeypatch.setattr(loop, "step_noise", noted)
    exact(name, known=Known(Z_T, jnp.ones(SHAPE)))
    assert len(draws) == 8  # of four steps, for what is known and for the rest
    assert len(np.unique(np.stack(draws))) == 8 * Z_T.size


@pytest.mark.parametrize("name", SAMPLERS)
def test_frames_are_predictions_and_change_no_sample(name):
    seen = []
    z0, frames = exact(name, watch=seen, every=2)
    np.testing.assert_array_equal(z0, plain(name))
    # Heun's second prediction of a step is not one of its frames.
    predictions = seen[::2] if name in ("heun", "edm") else seen
    assert frames.shape == (2, *SHAPE)
    assert len(predictions) == (5 if name == "plms" else 4)
    np.testing.assert_array_equal(frames, np.stack(predictions[1:4:2]))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_temperature_scales_the_noise_and_one_is_neutral(name):
    np.testing.assert_array_equal(exact(name, temperature=1.0), plain(name))
    run = jax.jit(sampler(name))

    def at(seeds, temperature):
        return run(Z_T, keys_of(seeds), temperature=temperature)

    hot, cold, frozen = at([0, 1], 1.0), at([0, 1], 0.5), at([0, 1], 0.0)
    np.testing.assert_allclose(at([3, 4], 0.0), frozen, atol=1e-6)
    assert np.abs(hot - at([3, 4], 1.0)).max() > 1e-3 and np.abs(hot - cold).max() > 1e-3
    assert run._cache_size() == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_memory_does_not_grow_with_the_steps(name):
    shapes = jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.float32), keys_of([0, 1])
    peak = [
        jax.jit(sampler(name, count)).lower(*shapes).compile().memory_analysis()
        for count in (5, 50)
    ]
    assert peak[0].temp_size_in_bytes > 0
    # Rows of coefficients, far less than a latent a step.
    assert peak[1].temp_size_in_bytes <= peak[0].temp_size_in_bytes + 50 * 64
