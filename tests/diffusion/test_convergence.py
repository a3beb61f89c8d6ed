"""Every sampler's order of convergence, measured in f64 on exact denoisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grid import Grid, make_grid
from ldm_jax.diffusion.process import ProcessConfig, make_process, rows
from ldm_jax.diffusion.samplers import SAMPLERS, loop, options
from ldm_jax.keys import example_keys, key_for

EDM = make_process(ProcessConfig("edm"))
MEANS, STD = np.array([-0.8, 0.5]), 0.4
Z_T = np.array([-9.0, -2.0, 1.0, 7.0]).reshape(4, 1, 1, 1)

DETERMINISTIC = {
    "ddim": 1,
    "euler": 1,
    "dpmpp_1s": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "plms": 2,
    "unipc-1": 2,
    "unipc-2": 3,
    "unipc-3": 4,
}
"""Claims. PLMS' weights are for equal steps in sigma / alpha, where its own first steps leave order
3. UniPC's corrector lifts every order by one."""


WEAK = {
    "ddpm": (1, EDM, {}),
    "ddim-eta": (1, EDM, {"eta": 0.7}),
    "euler_ancestral": (1, EDM, {}),
    "edm": (2, EDM, {"churn": 10.0, "inflation": 1.0}),
    "dpmpp_2m_sde": (2, EDM, {}),
    "sde_flow": (1, make_process(ProcessConfig("flow")), {}),
}
"""Claims of the law that is drawn: (order, process, options)."""


def sampler_of(label):
    name, _, order = label.partition("-")
    return functools.partial(SAMPLERS[name], order=int(order)) if order else SAMPLERS[name]


def expectation(xp, z, alpha, sigma):
    """E[x0 | z] for x0 drawn from two normals of equal weight."""
    total = alpha**2 * STD**2 + sigma**2
    logits = [-((z - alpha * m) ** 2) / (2 * total) for m in MEANS]
    share = 1 / (1 + xp.exp(logits[1] - logits[0]))
    mean = share * MEANS[0] + (1 - share) * MEANS[1]
    return mean + alpha * STD**2 / total * (z - alpha * mean)


def exact(process):
    def predict(z_t, t, cond):
        alpha, sigma = (rows(c, z_t) for c in process.coefficients(t))
        x0 = expectation(jnp, z_t, alpha, sigma)
        return x0, (z_t - alpha * x0) / sigma

    return predict


@functools.cache
def flow_of(high, low):
    """The end of the probability flow from Z_T, by Runge-Kutta in ln(sigma) on the host."""
    z, u, count = Z_T.copy(), np.log(high), 2000
    h = (np.log(low) - u) / count

    def slope(u, z):
        return z - expectation(np, z, 1.0, np.exp(u))

    for _ in range(count):
        a = slope(u, z)
        b = slope(u + h / 2, z + h / 2 * a)
        c = slope(u + h / 2, z + h / 2 * b)
        z = z + h / 6 * (a + 2 * b + 2 * c + slope(u + h, z + h * c))
        u += h
    return z


def geometric(count):
    return np.geomspace(10.0, 0.1, count + 1)


def equal(count):
    return np.linspace(10.0, 1.0, count + 1)


def grid_of(times, process=EDM):
    """A grid on times, then two steps of no length that take what multistep samplers give up."""
    times = np.append(times, times[-1] * (1 - np.array([1e-9, 2e-9])))
    return Grid(process, times, *process.host_coefficients(times))


def order_of(sampler, spacing, counts):
    errors = []
    with jax.enable_x64(True):
        keys = example_keys(key_for(0, "sampler"), jnp.arange(4))
        for count in counts:
            grid = grid_of(spacing(count))
            z0 = jax.jit(lambda z, k, grid=grid: sampler(exact(EDM), grid, z, None, k))(Z_T, keys)
            error = np.asarray(z0) - flow_of(grid.sigma[0], grid.sigma[-1])
            errors.append(np.sqrt(np.mean(error**2)))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors


@pytest.mark.parametrize(("label", "claim"), DETERMINISTIC.items())
def test_measured_order_is_the_claimed_one(label, claim):
    order, errors = order_of(sampler_of(label), geometric, [48, 96, 192])
    print(f"{label:10s} order {order:.2f} claimed {claim}, error of 192 steps {errors[-1]:.1e}")
    assert order == pytest.approx(claim, abs=0.3)


def test_plms_is_of_order_three_on_equal_steps():
    order, _ = order_of(SAMPLERS["plms"], equal, [24, 48, 96])
    assert order == pytest.approx(3, abs=0.4)


def variance_of(monkeypatch, name, grid, variance):
    """Of what a sampler draws for data N(0, variance), exactly: each row has one of its noises.

    With the exact denoiser a sample is linear in the initial and in every step's noise.
    """
    count, process = grid.num_steps, grid.process

    def basis(keys, index, like, use=0):
        return (jnp.arange(count + 1) == index).astype(like.dtype).reshape(-1, 1, 1, 1)

    def predict(z_t, t, cond):
        alpha, sigma = (rows(c, z_t) for c in process.coefficients(t))
        x0 = alpha * variance / (alpha**2 * variance + sigma**2) * z_t
        return x0, (z_t - alpha * x0) / sigma

    monkeypatch.setattr(loop, "step_noise", basis)
    z_T = np.zeros((count + 1, 1, 1, 1))
    z_T[-1] = np.sqrt(grid.alpha[0] ** 2 * variance + grid.sigma[0] ** 2)
    sampler = SAMPLERS[name.partition("-")[0]]
    run = jax.jit(lambda z: sampler(predict, grid, z, None, None, **WEAK[name][2]))
    return float(np.sum(np.asarray(run(z_T)) ** 2))


def weak_order_of(monkeypatch, name, counts):
    """The order of the variance's error, and the errors, relative."""
    _, process, _ = WEAK[name]
    high, low = (10.0, 0.1) if process is EDM else (0.9, 0.1)
    errors = []
    with jax.enable_x64(True):
        for count in counts:
            grid = grid_of(np.geomspace(high, low, count + 1), process)
            got = variance_of(monkeypatch, name, grid, STD**2)
            want = grid.alpha[-1] ** 2 * STD**2 + grid.sigma[-1] ** 2
            errors.append(abs(got / want - 1))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors


@pytest.mark.parametrize("name", WEAK)
def test_order_of_the_law_that_is_drawn_is_the_claimed_one(monkeypatch, name):
    order, errors = weak_order_of(monkeypatch, name, [32, 128])
    print(f"{name:15s} order {order:.2f} claimed {WEAK[name][0]}, error {errors[-1]:.1e}")
    assert order == pytest.approx(WEAK[name][0], abs=0.3)


def test_every_sampler_has_a_claim_and_every_stochastic_one_a_law():
    drawing = {name for name in SAMPLERS if "temperature" in options(name)}
    assert {label.partition("-")[0] for label in WEAK} == drawing
    assert {name for name, *_ in STOCHASTIC} == drawing
    assert {label.partition("-")[0] for label in [*DETERMINISTIC, *WEAK]} == set(SAMPLERS)


def gaussian(process, mean, covariance):
    """The exact (x0, eps) for data N(mean [C], covariance [C, C]) at every pixel."""
    variances, axes = np.linalg.eigh(covariance)

    def predict(z_t, t, cond):
        alpha, sigma = (rows(c, z_t) for c in process.coefficients(t))
        gain = alpha * variances.reshape(1, 1, 1, -1).astype(np.float32)
        gain = gain / (alpha * gain + sigma**2)
        centre = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
        turned = ((z_t - alpha * centre) @ jnp.asarray(axes, jnp.float32)) * gain
        x0 = centre + turned @ jnp.asarray(axes.T, jnp.float32)
        return x0, (z_t - alpha * x0) / sigma

    return predict


STOCHASTIC = [
    ("ddpm", ProcessConfig(), "leading", 250, {}),
    ("ddpm", ProcessConfig("cosine", zero_terminal_snr=True), "trailing", 250, {}),
    ("ddim", ProcessConfig("flow"), "auto", 200, {"eta": 0.7}),
    ("euler_ancestral", ProcessConfig(), "karras", 200, {}),
    ("edm", ProcessConfig("edm"), "auto", 100, {"inflation": 1.0}),
    ("dpmpp_2m_sde", ProcessConfig(), "trailing", 100, {}),
    ("dpmpp_2m_sde", ProcessConfig("flow"), "shifted:2", 100, {}),
    ("sde_flow", ProcessConfig("flow"), "last_step", 400, {}),
    ("sde_flow", ProcessConfig("flow_cosine"), "last_step", 400, {}),
]


@pytest.mark.parametrize(("name", "config", "spacing", "num_steps", "options"), STOCHASTIC)
def test_stochastic_sampler_reproduces_mean_and_covariance(
    name, config, spacing, num_steps, options
):
    mean, covariance = np.array([0.8, -0.5]), np.array([[0.5, 0.3], [0.3, 0.4]])
    process = make_process(config)
    grid, predict = make_grid(process, num_steps, spacing), gaussian(process, mean, covariance)
    noise = jax.random.normal(key_for(0, "many"), (8, 32, 32, 2))
    keys = example_keys(key_for(0, "sampler"), jnp.arange(8))
    run = jax.jit(lambda z, k: SAMPLERS[name](predict, grid, z, None, k, **options))
    pixels = np.float64(run(grid.start(noise), keys)).reshape(-1, 2)
    scale = np.diag(covariance)
    # Four standard errors, and what so many steps leave of the continuous law.
    mean_error = 4 * np.sqrt(scale / len(pixels)) + 0.005
    covariance_error = 4 * np.sqrt((np.outer(scale, scale) + covariance**2) / len(pixels)) + 0.015
    assert np.all(np.abs(pixels.mean(axis=0) - mean) < mean_error)
    assert np.all(np.abs(np.cov(pixels.T) - covariance) < covariance_error)
