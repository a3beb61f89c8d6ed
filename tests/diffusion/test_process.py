"""Laws of the schedules and of the forward process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.process import (
    KINDS,
    PATHS,
    TABLES,
    ProcessConfig,
    at_network,
    corrupt,
    make_process,
)
from ldm_jax.errors import InputError
from ldm_jax.keys import key_for

# kind, beta_start, beta_end, then alpha_bar_0, alpha_bar_500, alpha_bar_999, log-SNR at the end.
PUBLISHED = [
    ("ldm_linear", 0.0015, 0.0195, 0.9985, 0.115, 1.42e-4, -8.86),
    ("ldm_linear", 0.0015, 0.0155, 0.9985, 0.150, 6.69e-4, -7.31),
    ("ldm_linear", 0.0015, 0.0205, 0.9985, 0.108, 9.7e-5, -9.24),
    ("ldm_linear", 0.00085, 0.012, 0.99915, 0.276, 4.66e-3, -5.36),
    ("ddpm_linear", 1e-4, 0.02, 0.9999, 0.078, 4.0e-5, -10.1),
]


@pytest.mark.parametrize("kind", TABLES)
def test_schedule_preserves_variance_and_decreases(kind):
    schedule = make_process(ProcessConfig(kind))
    assert schedule.alpha_bar.dtype == np.float64
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float64
    assert schedule.num_timesteps == 1000
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, atol=3e-7)
    np.testing.assert_allclose(schedule.alpha, np.sqrt(schedule.alpha_bar), rtol=1e-7)
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    assert 0 < schedule.alpha_bar[-1] < schedule.alpha_bar[0] < 1


@pytest.mark.parametrize(("kind", "start", "end", "first", "middle", "last", "log_snr"), PUBLISHED)
def test_schedule_has_the_published_values(kind, start, end, first, middle, last, log_snr):
    alpha_bar = make_process(ProcessConfig(kind, 1000, start, end)).alpha_bar
    assert alpha_bar[0] == pytest.approx(first, rel=1e-9)
    assert alpha_bar[500] == pytest.approx(middle, abs=6e-4)
    assert alpha_bar[999] == pytest.approx(last, rel=1e-2)
    assert np.log(alpha_bar[999] / (1 - alpha_bar[999])) == pytest.approx(log_snr, abs=0.03)


def test_cosine_schedule_is_the_published_one():
    u = np.arange(1, 1000) / 1000
    f = np.cos((np.append(0, u) + 0.008) / 1.008 * np.pi / 2) ** 2  # IDDPM eq. 17
    alpha_bar = make_process(ProcessConfig("cosine")).alpha_bar
    np.testing.assert_allclose(alpha_bar[:-1], f[1:] / f[0], rtol=1e-9)
    assert alpha_bar[-1] / alpha_bar[-2] == pytest.approx(1 - 0.999, rel=1e-9)


def test_schedule_is_the_product_of_kept_variances():
    schedule = make_process(ProcessConfig("ldm_linear", 3, 0.01, 0.09))
    np.testing.assert_allclose(schedule.alpha_bar, [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91])


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"kind": "linear"}, "'linear'"),
        ({"num_timesteps": 0}, "0"),
        ({"num_timesteps": 10.0}, "10.0"),
        ({"beta_start": 0.0}, "0.0"),
        ({"beta_end": 0.001}, "0.001"),
        ({"beta_end": 1.0}, "1.0"),
        ({"beta_end": float("nan")}, "nan"),
        ({"kind": "flow", "zero_terminal_snr": True}, "zero_terminal_snr.*'flow'"),
        ({"sigma_data": 0.0}, "sigma_data 0.0 must be above 0; whitened"),
        ({"sigma_data": float("inf")}, "sigma_data inf must be above 0 and finite"),
        ({"sigma_min": 90.0}, "sigma_min 90.0"),
    ],
)
def test_process_refuses_a_field_outside_its_range(fields, value):
    with pytest.raises(InputError, match=value):
        make_process(ProcessConfig(**fields))


def draw(dtype):
    t = jnp.array([0, 1, 500, 998, 999], jnp.int32)
    z0 = jax.random.normal(key_for(0, "z0"), (5, 2, 3, 4), dtype)
    noise = jax.random.normal(key_for(0, "noise"), (5, 2, 3, 4), dtype)
    return z0, noise, t


def test_corrupt_keeps_f64():
    with jax.enable_x64(True):
        z0, noise, t = draw(jnp.float64)
        assert corrupt(make_process(ProcessConfig()), z0, noise, t).dtype == jnp.float64


def test_corrupt_scales_each_example_by_its_own_timestep():
    schedule = make_process(ProcessConfig())
    z0, noise, t = draw(jnp.float32)
    z_t = corrupt(schedule, z0, noise, t)
    assert z_t.dtype == jnp.float32
    for row, time in enumerate([0, 1, 500, 998, 999]):
        alpha_bar = schedule.alpha_bar[time]
        expected = alpha_bar**0.5 * np.array(z0[row]) + (1 - alpha_bar) ** 0.5 * np.array(
            noise[row]
        )
        np.testing.assert_allclose(z_t[row], expected, rtol=0, atol=1e-6)


def test_corrupt_asserts_a_time_per_example():
    z0, noise, _ = draw(jnp.float32)
    with pytest.raises(AssertionError):
        corrupt(make_process(ProcessConfig()), z0, noise, jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("kind", TABLES)
def test_zero_terminal_snr_ends_on_noise_and_keeps_its_start(kind):
    plain = make_process(ProcessConfig(kind))
    moved = make_process(ProcessConfig(kind, zero_terminal_snr=True))
    assert moved.alpha_bar[-1] == 0 and moved.sigma[-1] == 1 and moved.ends_on_noise
    assert moved.alpha_bar[0] == pytest.approx(plain.alpha_bar[0], rel=1e-12)
    assert np.all(np.diff(moved.alpha_bar) < 0)
    slopes = np.diff(moved.alpha) / np.diff(plain.alpha)
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)


@pytest.mark.parametrize("kind", [*PATHS, "edm"])
def test_path_goes_from_data_to_noise_at_its_rates(kind):
    process = make_process(ProcessConfig(kind))
    t = np.linspace(0, 1, 9)
    alpha, sigma = process.host_coefficients(t)
    assert (alpha[0], sigma[0]) == (1, 0)
    assert process.ends_on_noise == (kind != "edm")
    if process.ends_on_noise:
        assert (alpha[-1], sigma[-1]) == (0, 1)
    with jax.enable_x64(True):
        traced = process.coefficients(jnp.asarray(t))
        np.testing.assert_allclose(traced, (alpha, sigma), rtol=0, atol=1e-15)
        one = jax.jvp(process.coefficients, [jnp.asarray(t)], [jnp.ones(9)])[1]
        np.testing.assert_allclose(process.rates(jnp.asarray(t)), one, rtol=0, atol=1e-14)
    np.testing.assert_allclose(process.time_of_ratio(sigma[:-1] / alpha[:-1]), t[:-1], atol=1e-15)


@pytest.mark.parametrize("kind", ["cosine", "ldm_linear", "flow_cosine"])
def test_variance_is_preserved(kind):
    process = make_process(ProcessConfig(kind))
    t = jnp.arange(1000) if process.discrete else jnp.linspace(0, 1, 1000)
    alpha, sigma = process.coefficients(t)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=0, atol=3e-7)


@pytest.mark.parametrize("kind", TABLES)
def test_fractional_timestep_lies_between_and_a_whole_one_is_the_table(kind):
    process = make_process(ProcessConfig(kind))
    whole = jnp.array([0, 1, 500, 998])
    for ours, table in zip(
        process.coefficients(whole.astype(float)), process.coefficients(whole), strict=True
    ):
        np.testing.assert_allclose(ours, table, rtol=2e-5)
    alpha, sigma = process.coefficients(jnp.array([500.5]))
    ratio = (process.sigma / process.alpha)[[500, 501]]
    assert float(sigma[0] / alpha[0]) == pytest.approx(np.sqrt(ratio.prod()), rel=1e-5)
    np.testing.assert_allclose(process.time_of_ratio(ratio), [500, 501], rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_network_is_given_a_time_and_an_input_of_its_range(kind):
    process = make_process(ProcessConfig(kind, sigma_data=0.5))
    seen = []

    def network(z_t, t, cond):
        seen.append((z_t, t))
        return z_t

    denoiser = at_network(process, network)
    t = jnp.array([3, 900]) if process.discrete else jnp.array([0.25, 0.75])
    z_t = jnp.ones((2, 1, 1, 1))
    denoiser(z_t, t, None)
    expected = t if process.discrete else 1000 * t
    scale = np.ones(2)
    if kind == "edm":
        expected, scale = np.log(t) / 4, 1 / np.sqrt(0.25 + t**2)
    np.testing.assert_allclose(seen[0][1], expected, rtol=1e-6)
    np.testing.assert_allclose(seen[0][0][:, 0, 0, 0], scale, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_native_time_is_the_inverse_of_the_unit_time(kind):
    process = make_process(ProcessConfig(kind))
    u = [0.0, 0.123, 0.5, 1.0]
    native = np.array([process.native_time(each) for each in u])
    np.testing.assert_allclose(process.unit_time(jnp.asarray(native)), u, atol=1e-6)
    assert np.all(np.diff(native) > 0)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("ldm_linear", 0, 999), ("flow", 0, 1), ("edm", 0.002, 80)]
)
def test_training_sees_both_ends_and_nothing_beyond(kind, low, high):
    times = make_process(ProcessConfig(kind)).training_time(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(times, [low, high], rtol=1e-5)
