"""Laws of the schedules and of the forward process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.process import (
    SCHEDULES,
    ScheduleConfig,
    corrupt,
    eps_from_z0,
    make_schedule,
    z0_from_eps,
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


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedule_preserves_variance_and_decreases(kind):
    schedule = make_schedule(ScheduleConfig(kind))
    assert schedule.alpha_bar.dtype == np.float64
    assert schedule.alpha.dtype == schedule.sigma.dtype == np.float32
    assert schedule.num_timesteps == 1000
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1, atol=3e-7)
    np.testing.assert_allclose(schedule.alpha, np.sqrt(schedule.alpha_bar), rtol=1e-7)
    assert np.all(np.diff(schedule.alpha_bar) < 0)
    assert 0 < schedule.alpha_bar[-1] < schedule.alpha_bar[0] < 1


@pytest.mark.parametrize(("kind", "start", "end", "first", "middle", "last", "log_snr"), PUBLISHED)
def test_schedule_has_the_published_values(kind, start, end, first, middle, last, log_snr):
    alpha_bar = make_schedule(ScheduleConfig(kind, 1000, start, end)).alpha_bar
    assert alpha_bar[0] == pytest.approx(first, rel=1e-9)
    assert alpha_bar[500] == pytest.approx(middle, abs=6e-4)
    assert alpha_bar[999] == pytest.approx(last, rel=1e-2)
    assert np.log(alpha_bar[999] / (1 - alpha_bar[999])) == pytest.approx(log_snr, abs=0.03)


def test_schedule_is_the_product_of_kept_variances():
    schedule = make_schedule(ScheduleConfig("ldm_linear", 3, 0.01, 0.09))
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
    ],
)
def test_schedule_refuses_a_field_outside_its_range(fields, value):
    with pytest.raises(InputError, match=value):
        make_schedule(ScheduleConfig(**fields))


def draw(dtype):
    t = jnp.array([0, 1, 500, 998, 999], jnp.int32)
    z0 = jax.random.normal(key_for(0, "z0"), (5, 2, 3, 4), dtype)
    noise = jax.random.normal(key_for(0, "noise"), (5, 2, 3, 4), dtype)
    return z0, noise, t


@pytest.mark.parametrize("kind", SCHEDULES)
def test_conversions_invert_corrupt_in_f64(kind):
    schedule = make_schedule(ScheduleConfig(kind))
    with jax.enable_x64(True):
        z0, noise, t = draw(jnp.float64)
        z_t = corrupt(schedule, z0, noise, t)
        assert z_t.dtype == jnp.float64
        np.testing.assert_allclose(z0_from_eps(schedule, z_t, noise, t), z0, rtol=0, atol=1e-12)
        np.testing.assert_allclose(eps_from_z0(schedule, z_t, z0, t), noise, rtol=0, atol=1e-12)


def test_corrupt_scales_each_example_by_its_own_timestep():
    schedule = make_schedule(ScheduleConfig())
    z0, noise, t = draw(jnp.float32)
    z_t = corrupt(schedule, z0, noise, t)
    assert z_t.dtype == jnp.float32
    for row, time in enumerate([0, 1, 500, 998, 999]):
        alpha_bar = schedule.alpha_bar[time]
        expected = alpha_bar**0.5 * np.array(z0[row]) + (1 - alpha_bar) ** 0.5 * np.array(
            noise[row]
        )
        np.testing.assert_allclose(z_t[row], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [jnp.zeros((5,), jnp.float32), jnp.zeros((), jnp.int32)])
def test_corrupt_asserts_integer_timesteps_per_example(t):
    z0, noise, _ = draw(jnp.float32)
    with pytest.raises(AssertionError):
        corrupt(make_schedule(ScheduleConfig()), z0, noise, t)
