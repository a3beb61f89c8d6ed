"""Laws of the samplers: grids, the formulae step by step, and exact Gaussian denoisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grid import Grid, make_grid, uniform_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, corrupt, make_process, rows
from ldm_jax.diffusion.samplers import SAMPLERS, ddim, ddpm
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like

PROCESS = make_process(ProcessConfig())
SHAPE = (3, 4, 4, 2)
Z_T = jax.random.normal(key_for(0, "z_T"), SHAPE)


FLOW, EDM = make_process(ProcessConfig("flow")), make_process(ProcessConfig("edm"))
HOME = {"sde_flow": (FLOW, "v"), "edm": (EDM, "v")}  # processes of samplers that refuse timesteps


def draw(sampler, denoiser, z_T, cond, keys, num_steps, spacing="auto", **options):
    name = next((name for name, entry in SAMPLERS.items() if entry is sampler), "")
    process, parameterisation = HOME.get(name, (PROCESS, "eps"))
    predict = predictor(process, parameterisation, denoiser)
    grid = make_grid(process, num_steps, spacing)
    return sampler(predict, grid, grid.start(z_T), cond, keys, **options)


def keys_of(indices):
    return example_keys(key_for(0, "sampler"), jnp.asarray(indices))


def nonlinear(z_t, t, cond):
    return 0.6 * jnp.tanh(z_t) + 0.4 * jnp.sin(t / 150).reshape(-1, 1, 1, 1)


def with_cond(z_t, t, cond):
    return nonlinear(z_t, t, None) + cond.reshape(-1, 1, 1, 1)


def reference(z, num_steps, eta, noises):
    """DDIM in f64, written from the paper's equations and LDM's list of timesteps."""
    z = np.asarray(z, np.float64)
    first = 0 if num_steps == 1000 else 1
    times = [i * 1000 // num_steps + first for i in range(num_steps)]
    a = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    for k in reversed(range(num_steps)):
        a_t = a[times[k]]
        a_s = a[times[k - 1]] if k else (1.0 if num_steps == 1000 else a[0])
        eps = nonlinear_eps(z, times[k])
        z0 = (z - np.sqrt(1 - a_t) * eps) / np.sqrt(a_t)
        s = eta * np.sqrt((1 - a_s) / (1 - a_t)) * np.sqrt(1 - a_t / a_s)
        z = np.sqrt(a_s) * z0 + np.sqrt(1 - a_s - s**2) * eps + s * noises[num_steps - 1 - k]
    return z


def nonlinear_eps(z, t):
    """`nonlinear` of one time on the host."""
    return 0.6 * np.tanh(z) + 0.4 * np.sin(t / 150)


def dpmpp_2m_reference(z, grid):
    """DPM-Solver++'s algorithm 2 in f64; the last of fewer than 15 steps is DDIM's."""
    z, x0, lam = np.asarray(z, np.float64), [], np.log(grid.alpha / grid.sigma)
    for i in range(grid.num_steps):
        alpha, sigma = grid.alpha[i], grid.sigma[i]
        x0.append((z - sigma * nonlinear_eps(z, grid.times[i])) / alpha)
        h, d = lam[i + 1] - lam[i], x0[-1]
        if i and not (i == grid.num_steps - 1 and grid.num_steps < 15):
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0[-1] - 1 / (2 * r) * x0[-2]
        z = grid.sigma[i + 1] / sigma * z - grid.alpha[i + 1] * (np.exp(-h) - 1) * d
    return z


def plms_reference(z, grid):
    """PLMS in f64, from PNDM eq. 12 and LDM's first step, a pseudo improved Euler one."""

    def eps(z, i):
        return nonlinear_eps(z, grid.times[i])

    def onward(z, eps, i):
        x0 = (z - grid.sigma[i] * eps) / grid.alpha[i]
        return grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * eps

    z, past = np.asarray(z, np.float64), []
    for i in range(grid.num_steps):
        past.append(eps(z, i))
        if i == 0:
            slope = past[0]
            if grid.num_steps > 1:
                slope = (past[0] + eps(onward(z, past[0], 0), 1)) / 2
        elif i == 1:
            slope = (3 * past[-1] - past[-2]) / 2
        elif i == 2:
            slope = (23 * past[-1] - 16 * past[-2] + 5 * past[-3]) / 12
        else:
            slope = (55 * past[-1] - 59 * past[-2] + 37 * past[-3] - 9 * past[-4]) / 24
        z = onward(z, slope, i)
    return z


def edm_reference(z, grid, noises, churn):
    """EDM's algorithm 2 in f64, with its S_tmin, S_tmax and S_noise for ImageNet (table 5)."""

    def slope(z, sigma):
        v = nonlinear_eps(z, sigma)
        x0 = (z - sigma * v) / (1 + sigma**2)  # v = eps - sigma x0 and z = x0 + sigma eps
        return (z - x0) / sigma

    z = np.asarray(z, np.float64)
    for i, noise in enumerate(noises):
        low, high = grid.times[i + 1], grid.times[i]
        gamma = min(churn / len(noises), np.sqrt(2) - 1) if 0.05 <= high <= 50 else 0.0
        raised = high * (1 + gamma)
        z = z + np.sqrt(raised**2 - high**2) * 1.003 * noise
        d = slope(z, raised)
        euler = z + (low - raised) * d
        z = z + (low - raised) * (d + slope(euler, low)) / 2 if low else euler
    return z


def step_noises(keys, num_steps):
    def one(index):
        return normal_like(jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index), Z_T)

    return np.asarray(jax.lax.map(one, jnp.arange(num_steps)), np.float64)


@pytest.mark.parametrize(("sampler", "eta"), [(ddim, -0.1), (ddim, 1.5), (ddim, float("nan"))])
def test_sampler_refuses_an_eta_it_cannot_honour(sampler, eta):
    with pytest.raises(InputError, match=f"eta {eta}"):
        draw(sampler, nonlinear, Z_T, None, keys_of([0, 1, 2]), num_steps=5, eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
def test_ddim_equals_an_f64_reference_step_by_step(num_steps, eta):
    keys = keys_of([0, 1, 2])
    z0 = draw(ddim, nonlinear, Z_T, None, keys, num_steps=num_steps, eta=eta)
    expected = reference(Z_T, num_steps, eta, step_noises(keys, num_steps))
    np.testing.assert_allclose(z0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_plms_equals_an_f64_reference_step_by_step(num_steps):
    z0 = draw(SAMPLERS["plms"], nonlinear, Z_T, None, keys_of([0, 1, 2]), num_steps=num_steps)
    expected = plms_reference(Z_T, make_grid(PROCESS, num_steps))
    np.testing.assert_allclose(z0, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 14, 15])
def test_dpmpp_2m_equals_an_f64_reference_step_by_step(num_steps):
    z0 = draw(SAMPLERS["dpmpp_2m"], nonlinear, Z_T, None, keys_of([0, 1, 2]), num_steps=num_steps)
    expected = dpmpp_2m_reference(Z_T, make_grid(PROCESS, num_steps))
    np.testing.assert_allclose(z0, expected, rtol=1e-4, atol=1e-4)


def test_unipc_has_order_one_where_its_differences_would_begin_at_pure_noise():
    """UniPC with B(h) = e^h - 1: data prediction's DDIM step, corrected by half of both ends."""
    times = np.array([1.0, 0.75, 0.5, 0.25])  # on data itself the last correction is not used
    grid = Grid(FLOW, times, *FLOW.host_coefficients(times))
    predict = predictor(FLOW, "x0", nonlinear)
    got = SAMPLERS["unipc"](predict, grid, Z_T, None, keys_of([0, 1, 2]), order=2)
    z, past = np.asarray(Z_T, np.float64), None
    start = z
    for i in range(3):
        x0 = nonlinear_eps(z, grid.times[i])
        if i:
            stretch = grid.sigma[i] / grid.sigma[i - 1]
            kept = stretch * grid.alpha[i - 1] / grid.alpha[i]  # e^-h
            z = stretch * start + grid.alpha[i] * (1 - kept) * (x0 + past) / 2
        start, past = z, x0
        stretch = grid.sigma[i + 1] / grid.sigma[i]
        kept = stretch * grid.alpha[i] / grid.alpha[i + 1]
        z = stretch * start + grid.alpha[i + 1] * (1 - kept) * x0
    np.testing.assert_allclose(got, z, rtol=1e-5, atol=1e-5)


def test_sde_flow_is_the_published_equation_step_by_step():
    """Euler-Maruyama on SiT eq. 4 with w = 2 sigma, and without noise in its last step."""
    keys, grid = keys_of([0, 1, 2]), make_grid(FLOW, 4, "last_step")
    predict = predictor(FLOW, "velocity", nonlinear)
    got = SAMPLERS["sde_flow"](predict, grid, Z_T, None, keys)
    z = np.asarray(Z_T, np.float64)
    for i, noise in enumerate(step_noises(keys, 4)):
        t, dt = grid.times[i], grid.times[i + 1] - grid.times[i]
        velocity = nonlinear_eps(z, t)
        eps = z + (1 - t) * velocity  # z = (1 - t) x0 + t eps, velocity = eps - x0
        z = z + (velocity + eps) * dt + (i < 3) * np.sqrt(2 * t * -dt) * noise
    np.testing.assert_allclose(got, z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("churn", [2.0, 40.0])
def test_edm_is_the_published_algorithm_step_by_step(churn):
    keys, grid = keys_of([0, 1, 2]), make_grid(EDM, 8)
    # The two ends lie outside of S_tmin..S_tmax.
    assert grid.times[0] > 50 and grid.times[-2] < 0.05
    z0 = draw(SAMPLERS["edm"], nonlinear, Z_T, None, keys, num_steps=8, churn=churn)
    z_T = 80 * np.float64(Z_T)
    expected = edm_reference(z_T, grid, step_noises(keys, 8), churn)
    np.testing.assert_allclose(z0, expected, rtol=1e-3, atol=1e-3)
    default = draw(SAMPLERS["edm"], nonlinear, Z_T, None, keys, num_steps=8)
    assert np.array_equal(default, z0) == (churn == 40)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
def test_ddpm_is_ddim_at_eta_one(num_steps):
    keys = keys_of([0, 1, 2])
    ancestral = draw(ddpm, nonlinear, Z_T, None, keys, num_steps=num_steps)
    implicit = draw(ddim, nonlinear, Z_T, None, keys, num_steps=num_steps, eta=1.0)
    np.testing.assert_allclose(ancestral, implicit, rtol=1e-4, atol=1e-4)


def test_ddim_at_eta_zero_draws_nothing():
    keys = keys_of([0, 1, 2])
    jaxpr = jax.make_jaxpr(
        lambda eta: draw(ddim, nonlinear, Z_T, None, keys, num_steps=5, eta=eta),
        static_argnums=0,
    )
    assert "random" not in str(jaxpr(0.0))
    assert "random" in str(jaxpr(0.5))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_sample_depends_on_its_own_noise_condition_and_key_only(sampler):
    cond = jnp.array([0.2, -0.4, 0.9])

    def run(rows):
        rows = np.array(rows)
        return draw(sampler, with_cond, Z_T[rows], cond[rows], keys_of(rows), num_steps=12)

    whole = run([0, 1, 2])
    np.testing.assert_allclose(run([2, 0]), whole[np.array([2, 0])], rtol=0, atol=1e-6)
    np.testing.assert_allclose(run([1]), whole[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [ddpm, functools.partial(ddim, eta=1.0)])
def test_another_key_gives_another_sample(sampler):
    z0 = [
        draw(sampler, nonlinear, Z_T, None, keys_of(indices), num_steps=5)
        for indices in ([0, 1, 2], [0, 4, 2])
    ]
    moved = np.abs(np.asarray(z0[0] - z0[1])).max(axis=(1, 2, 3)) > 1e-3
    np.testing.assert_array_equal(moved, [False, True, False])


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_state_is_f32_when_the_denoiser_answers_in_bf16(sampler):
    seen = []

    def low_precision(z_t, t, cond):
        seen.append((z_t.dtype, t.dtype, t.shape))
        return nonlinear(z_t, t, cond).astype(jnp.bfloat16)

    z_T, keys = Z_T.astype(jnp.bfloat16), keys_of([0, 1, 2])
    z0 = draw(sampler, low_precision, z_T, None, keys, num_steps=4)
    assert z0.dtype == jnp.float32
    assert z0.shape == SHAPE
    assert {z for z, _, _ in seen} == {jnp.dtype("float32")}
    assert {t for _, t, _ in seen} < {jnp.dtype("int32"), jnp.dtype("float32")}
    assert {shape for _, _, shape in seen} == {(3,)}


def oracle_of(process, z0):
    def predict(z_t, t, cond):
        alpha, sigma = (rows(c, z_t) for c in process.coefficients(t))
        return z0, (z_t - alpha * z0) / sigma

    return predict


@pytest.mark.parametrize(
    ("name", "process"),
    [
        pytest.param(name, process, id=f"{name}-{process.config.kind}")
        for name in SAMPLERS
        for process in ((HOME[name][0],) if name in HOME else (PROCESS, FLOW, EDM))
    ],
)
def test_a_denoiser_that_knows_the_data_gets_it_back(name, process):
    """With no noise left over, on a grid that ends on data."""
    z0 = jax.random.normal(key_for(0, "z0"), SHAPE)
    grid = make_grid(process, 20, "trailing" if process.discrete else "auto")
    predict = oracle_of(process, z0)
    if name == "plms" and process is FLOW:
        with pytest.raises(InputError, match="alpha is 0"):
            SAMPLERS[name](predict, grid, Z_T, None, keys_of([0, 1, 2]))
        return
    sample = SAMPLERS[name](predict, grid, grid.start(Z_T), None, keys_of([0, 1, 2]))
    # The last step of the SDE goes by its drift, which takes eps off twice over.
    left = 0.05 * 8 if name == "sde_flow" else 2e-5
    np.testing.assert_allclose(sample, z0, rtol=0, atol=left)


def test_full_chain_of_timesteps_ends_on_data_itself():
    z0 = jax.random.normal(key_for(0, "z0"), SHAPE)
    sample = ddpm(oracle_of(PROCESS, z0), make_grid(PROCESS, 1000), Z_T, None, keys_of([0, 1, 2]))
    np.testing.assert_allclose(sample, z0, rtol=0, atol=1e-5)


def test_last_frame_on_a_grid_to_the_data_is_the_sample():
    z0, frames = SAMPLERS["ddim"](
        predictor(FLOW, "v", nonlinear), make_grid(FLOW, 6), Z_T, None, keys_of([0, 1, 2]), every=3
    )
    np.testing.assert_allclose(frames[-1], z0, atol=1e-6)


def test_editing_begins_at_the_noised_image():
    grid = make_grid(PROCESS, 20).after(12)
    z0 = jax.random.normal(key_for(0, "z0"), SHAPE)
    state = grid.start(Z_T, z0)
    t = jnp.full(3, grid.times[0])
    np.testing.assert_allclose(state, corrupt(PROCESS, z0, Z_T, t), rtol=0, atol=1e-6)
    assert grid.num_steps == 8
    same = ddim(oracle_of(PROCESS, z0), grid, state, None, keys_of([0, 1, 2]))
    end = jnp.zeros(3, jnp.int32)
    np.testing.assert_allclose(same, corrupt(PROCESS, z0, Z_T, end), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"start step 20 must be in 0\.\.19"):
        make_grid(PROCESS, 20).after(20)


def gaussian_denoiser(mean, covariance):
    """The exact noise prediction for data N(mean [C], covariance [C, C]) at every pixel."""
    variances, axes = np.linalg.eigh(covariance)
    axes, variances, mean = (
        jnp.asarray(axes, jnp.float32),
        jnp.asarray(variances),
        jnp.asarray(mean),
    )

    def denoiser(z_t, t, cond):
        alpha = jnp.asarray(PROCESS.alpha)[t].reshape(-1, 1, 1, 1)
        sigma = jnp.asarray(PROCESS.sigma)[t].reshape(-1, 1, 1, 1)
        centred = (z_t - alpha * mean.reshape(1, 1, 1, -1)) @ axes
        total = alpha**2 * variances.reshape(1, 1, 1, -1) + sigma**2
        return (sigma * centred / total) @ axes.T

    return denoiser


def test_ddim_converges_to_the_probability_flow_with_order_one():
    mean, std = 0.7, 0.5
    denoiser = gaussian_denoiser([mean, mean], std**2 * np.eye(2))
    counts, errors = [50, 100, 200, 500], []
    for num_steps in counts:
        z0 = draw(ddim, denoiser, Z_T, None, keys_of([0, 1, 2]), num_steps=num_steps)
        start, end = PROCESS.alpha_bar[[uniform_grid(1000, num_steps)[-1], 0]]
        stretch = np.sqrt((end * std**2 + 1 - end) / (start * std**2 + 1 - start))
        exact = np.sqrt(end) * mean + stretch * (np.float64(Z_T) - np.sqrt(start) * mean)
        errors.append(np.sqrt(np.mean((np.float64(z0) - exact) ** 2)))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.1)  # 0.94, and rising with the counts
    assert errors[-1] < 0.005


def chain_law(mean, variance):
    """Mean and variance, in f64, that the whole ancestral chain gives for data N(mean, variance).

    With the exact denoiser each step is affine in z_t, so the law follows by recursion.
    """
    mu, v, a = 0.0, 1.0, PROCESS.alpha_bar
    for t in reversed(range(1000)):
        a_t, a_s = a[t], a[t - 1] if t else 1.0
        gain = np.sqrt(a_t) * variance / (a_t * variance + 1 - a_t)  # of E[z0 | z_t]
        of_z0 = np.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
        slope = of_z0 * gain + np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
        mu = slope * mu + of_z0 * (mean - gain * np.sqrt(a_t) * mean)
        v = slope**2 * v + (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    return mu, v


def test_ddpm_reproduces_mean_and_covariance():
    mean, covariance = np.array([0.8, -0.5]), np.array([[0.5, 0.3], [0.3, 0.4]])
    variances, axes = np.linalg.eigh(covariance)
    laws = [chain_law(m, v) for m, v in zip(axes.T @ mean, variances, strict=True)]
    exact_mean = axes @ np.array([m for m, _ in laws])
    exact_covariance = axes @ np.diag([v for _, v in laws]) @ axes.T
    # What a chain of 1000 steps misses of the data's own law.
    np.testing.assert_allclose(exact_mean, mean, rtol=0, atol=1e-4)
    np.testing.assert_allclose(exact_covariance, covariance, rtol=0, atol=0.01)

    z_T = jax.random.normal(key_for(0, "many"), (16, 32, 32, 2))
    denoiser = gaussian_denoiser(mean, covariance)
    z0 = draw(ddpm, denoiser, z_T, None, keys_of(np.arange(16)), num_steps=1000)
    pixels = np.float64(z0).reshape(-1, 2)
    scale = np.diag(covariance)
    mean_error = np.sqrt(scale / len(pixels))
    covariance_error = np.sqrt((np.outer(scale, scale) + covariance**2) / len(pixels))
    assert np.all(np.abs(pixels.mean(axis=0) - exact_mean) < 4 * mean_error)
    assert np.all(np.abs(np.cov(pixels.T) - exact_covariance) < 4 * covariance_error)
