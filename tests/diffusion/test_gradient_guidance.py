"""Gradient guidance with an exact likelihood is the exact posterior, whatever is predicted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.gradient_guidance import GAINS, gradient
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.diffusion.samplers import ddim
from ldm_jax.keys import example_keys, key_for

SPREAD, NOISE = 0.8, 0.5  # of the data, N(0, SPREAD^2), and of what is measured of it
Z_T = jax.random.normal(key_for(0, "z_T"), (3, 2, 2, 1))
Y = jax.random.normal(key_for(0, "measured"), (3, 2, 2, 1))
TIMES = jnp.array([0.1, 0.5, 0.9])
UNITS = "velocity", "eps", "v", "x0"


def levels(kind, t):
    """(alpha, sigma) of the linear path for velocities, of a variance-preserving one else."""
    if kind == "velocity":
        return 1 - t, t
    return jnp.cos(t * jnp.pi / 2), jnp.sin(t * jnp.pi / 2)


def rows(x):
    return x.reshape(-1, 1, 1, 1)


def prediction(kind, z_t, x0, t):
    alpha, sigma = (rows(a) for a in levels(kind, t))
    eps = (z_t - alpha * x0) / sigma
    return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0}[kind]


def to_x0(kind):
    def convert(z_t, p, t):
        alpha, sigma = (rows(a) for a in levels(kind, t))
        return {
            "eps": (z_t - sigma * p) / alpha,
            "x0": p,
            "v": alpha * z_t - sigma * p,
            "velocity": z_t - t.reshape(-1, 1, 1, 1) * p,
        }[kind]

    return convert


def exact(kind, mean: Any = 0.0, variance=SPREAD**2):
    """The denoiser of data N(mean, variance): E[x0 | z_t], as what `kind` predicts."""

    def denoiser(z_t, t, cond):
        alpha, sigma = (rows(a) for a in levels(kind, t))
        kept = alpha * variance / (alpha**2 * variance + sigma**2)
        return prediction(kind, z_t, mean + kept * (z_t - alpha * mean), t)

    return denoiser


def likelihood(kind):
    """log N(y; x0_hat, NOISE^2 + Var[x0 | z_t]): that of y = x0 + noise, given z_t."""

    def log_likelihood(z_t, x0, t):
        alpha, sigma = levels(kind, t)
        left = SPREAD**2 * sigma**2 / (alpha**2 * SPREAD**2 + sigma**2)
        return -0.5 * jnp.square(Y - x0).sum((1, 2, 3)) / (NOISE**2 + left)

    return log_likelihood


def guided(kind, scale):
    def gain(t):
        return GAINS[kind](*levels(kind, t))

    return gradient(exact(kind), to_x0(kind), likelihood(kind), gain, scale)


@pytest.mark.parametrize("kind", UNITS)
def test_an_exact_likelihood_gives_the_denoiser_of_the_posterior(kind):
    variance = 1 / (1 / SPREAD**2 + 1 / NOISE**2)
    want = exact(kind, variance / NOISE**2 * Y, variance)(Z_T, TIMES, None)
    np.testing.assert_allclose(guided(kind, 1.0)(Z_T, TIMES, None), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", UNITS)
def test_scale_zero_is_the_denoiser_bit_for_bit_and_scales_are_linear(kind):
    plain = exact(kind)(Z_T, TIMES, None)
    assert guided(kind, 0.0)(Z_T, TIMES, None).tobytes() == plain.tobytes()
    one, some = (np.float64(guided(kind, s)(Z_T, TIMES, None)) for s in (1.0, jnp.array([0, 2, 5])))
    want = np.float64(plain) + rows(np.array([0.0, 2, 5])) * (one - plain)
    np.testing.assert_allclose(some, want, rtol=1e-4, atol=1e-5)


def test_every_gain_was_tried():
    assert set(UNITS) == set(GAINS)


def test_samples_are_the_likelier_the_larger_the_scale_with_one_program():
    """By a picture's half-size likeness and by a classifier of the noisy latent."""
    schedule = make_process(ProcessConfig())
    alpha, sigma = jnp.asarray(schedule.alpha), jnp.asarray(schedule.sigma)
    keys, count = example_keys(key_for(0, "sampler"), jnp.arange(3)), 0

    def likeness(z_t, x0, t):
        return -2 * jnp.square(x0.mean((1, 2)) - 0.7).sum(-1)

    def classifier(z_t, x0, t):
        return jax.nn.log_sigmoid(3 * z_t.mean((1, 2)).sum(-1))

    def eps(z_t, t, cond):
        a, s = rows(alpha[t]), rows(sigma[t])
        return s * z_t / (a**2 * SPREAD**2 + s**2)

    def x0(z_t, p, t):
        return (z_t - rows(sigma[t]) * p) / rows(alpha[t])

    def gain(t):
        return GAINS["eps"](alpha[t], sigma[t])

    for log_likelihood in (likeness, classifier):

        @jax.jit
        def sample(scale, log_likelihood=log_likelihood):
            nonlocal count
            count += 1
            denoiser = gradient(eps, x0, log_likelihood, gain, scale)
            predict = predictor(schedule, "eps", denoiser)
            return ddim(predict, make_grid(schedule, 10), Z_T, None, keys)

        reached = [log_likelihood(z, z, None) for z in map(sample, (0.0, 1.0, 3.0))]
        assert (reached[1] > reached[0]).all() and (reached[2] > reached[1]).all()
    assert count == 2
