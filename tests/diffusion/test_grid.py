"""Laws of the grids: how many steps, from where to where, and which spacings a process has."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.grid import SPACINGS, make_grid, uniform_grid
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError

PROCESS = make_process(ProcessConfig())
FLOW, EDM = make_process(ProcessConfig("flow")), make_process(ProcessConfig("edm"))
ENDS_ON_NOISE = make_process(ProcessConfig(zero_terminal_snr=True))


def test_grid_has_exactly_the_steps_asked_for():
    for num_steps in range(1, 1001):
        grid = uniform_grid(1000, num_steps)
        assert len(grid) == num_steps
        assert np.all(np.diff(grid) > 0)
        assert 0 <= grid[0] <= grid[-1] <= 999


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 64])
def test_grid_holds_for_short_schedules(num_timesteps):
    for num_steps in range(1, num_timesteps + 1):
        grid = uniform_grid(num_timesteps, num_steps)
        assert len(set(grid.tolist())) == num_steps
        assert 0 <= grid[0] <= grid[-1] < num_timesteps


@pytest.mark.parametrize(("num_steps", "last"), [(50, 981), (200, 996), (250, 997), (500, 999)])
def test_grid_is_the_published_one_when_steps_divide_timesteps(num_steps, last):
    stride = 1000 // num_steps
    np.testing.assert_array_equal(uniform_grid(1000, num_steps), np.arange(1, last + 1, stride))


@pytest.mark.parametrize("process", [PROCESS, FLOW, EDM])
@pytest.mark.parametrize("num_steps", [0, -3, 1001, 2.5, True])
def test_grid_refuses_a_step_count_outside_the_schedule(process, num_steps):
    if num_steps == 1001 and not process.discrete:
        assert make_grid(process, num_steps).num_steps == num_steps
        return
    with pytest.raises(InputError, match=f"num_steps {num_steps}"):
        make_grid(process, num_steps)


@pytest.mark.parametrize(
    ("process", "spacing"),
    [(process, name) for process in (PROCESS, FLOW, EDM) for name in SPACINGS[type(process)]],
)
def test_grid_goes_down_from_noise_to_data(process, spacing):
    for count in (1, 2, 10, 100):
        grid = make_grid(process, count, spacing)
        assert grid.num_steps == count and np.all(np.diff(grid.times) < 0)
        assert np.all(np.diff(grid.log_ratio) > 0) and np.all(np.diff(grid.sigma) < 0)
        lands = spacing not in ("leading", "quad")
        assert (grid.sigma[-1] == 0) == lands
        # What the denoiser will compute at these times is what the coefficients say.
        if count > 1:
            traced = process.coefficients(jnp.asarray(grid.times[:-1]))
            np.testing.assert_allclose(
                traced, (grid.alpha[:-1], grid.sigma[:-1]), atol=2e-4, rtol=2e-5
            )


@pytest.mark.parametrize(
    ("process", "spacing", "words"),
    [
        (PROCESS, "uniform", "'uniform' is not one of a 'ldm_linear'"),
        (FLOW, "trailing", "'trailing' is not one of a 'flow'"),
        (FLOW, "karras", "'karras' is not one of a 'flow'"),
        (EDM, "shifted", "'shifted' is not one of a 'edm'"),
        (EDM, "last_step", "'last_step' is not one of a 'edm'"),
        (ENDS_ON_NOISE, "karras", "'karras' needs a finite.*use 'trailing'"),
        (ENDS_ON_NOISE, "exponential", "'exponential' needs a finite"),
        (PROCESS, "karras:x", "'karras:x' must be a name"),
        (PROCESS, "leading:2", "'leading:2' must be a name"),
        (FLOW, "last_step:1", "must be shorter than 1"),
    ],
)
def test_spacing_that_does_not_fit_is_refused(process, spacing, words):
    with pytest.raises(InputError, match=words):
        make_grid(process, 10, spacing)


def test_quad_is_ldms_where_it_repeats_nothing():
    root = np.linspace(0, 800**0.5, 20)
    expected = ((root**2).astype(int) + 1)[::-1]
    np.testing.assert_array_equal(make_grid(PROCESS, 20, "quad").times[:-1], expected)


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
    ],
)
def test_timesteps_of_ten_are_the_published_ones(spacing, expected):
    """Lin et al. 2023, table 2, which counts timesteps from 1; leading begins one later, as LDM."""
    np.testing.assert_array_equal(make_grid(PROCESS, 10, spacing).times[:-1], expected)


def test_trailing_timesteps_are_rounded():
    np.testing.assert_array_equal(make_grid(PROCESS, 3, "trailing").times, [999, 666, 332, -1])


@pytest.mark.parametrize("spacing", ["leading", "quad"])
def test_grid_that_stops_short_of_the_data_ends_on_the_first_timestep(spacing):
    grid = make_grid(PROCESS, 10, spacing)
    assert grid.times[-1] == 0 and grid.alpha[-1] == np.sqrt(1 - 0.0015)


@pytest.mark.parametrize(("spacing", "rho"), [("auto", 7), ("karras", 7), ("karras:3", 3)])
def test_karras_sigmas_are_edms(spacing, rho):
    i, high, low = np.arange(9) / 8, 80 ** (1 / rho), 0.002 ** (1 / rho)
    expected = np.append((high + i * (low - high)) ** rho, 0)  # EDM eq. 5
    grid = make_grid(EDM, 9, spacing)
    np.testing.assert_allclose(grid.times, expected, rtol=1e-12)
    np.testing.assert_array_equal(grid.sigma, grid.times)


def test_ratios_of_a_table_are_spaced_as_sigmas_are():
    ratio = PROCESS.sigma / PROCESS.alpha
    for spacing, power in (("karras", 1 / 7), ("exponential", 0)):
        grid = make_grid(PROCESS, 9, spacing)
        got = (grid.sigma / grid.alpha)[:-1]
        got = got**power if power else np.log(got)
        ends = ratio[[-1, 0]] ** power if power else np.log(ratio[[-1, 0]])
        np.testing.assert_allclose(got, np.linspace(*ends, 9), rtol=1e-9)


def test_spacings_of_unit_time_are_the_published_ones():
    expected = {
        "auto": [1, 0.75, 0.5, 0.25, 0],
        "shifted": [1, 0.9, 0.75, 0.5, 0],  # SD3 eq. 23 with shift 3
        "last_step": [1, 0.68, 0.36, 0.04, 0],  # SiT's last step
    }
    for spacing, times in expected.items():
        np.testing.assert_allclose(make_grid(FLOW, 4, spacing).times, times, atol=1e-15)
