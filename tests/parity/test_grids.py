"""Our noise schedules and grids against those of diffusers.

They agree but for these, each with its reason:

- Where S does not divide T diffusers' leading steps are by the whole part of T / S and end early;
  ours spread over all of T. With steps_offset 1 it has no T-step DDIM (it asks for timestep T);
  ours visits 0..T-1.
- diffusers' DPMSolverMultistep and UniPC take S of S + 1 linspaced or leading timesteps, leaving
  the last out; ours are spaced alike for every sampler.
- diffusers rounds the timesteps of Karras grids for DPMSolverMultistep; ours are k-diffusion's
  fractional ones, as in its Euler schedulers.
"""

import diffusers
import numpy as np
import pytest

from ldm_jax.diffusion.grid import make_grid, uniform_grid
from ldm_jax.diffusion.process import ProcessConfig, make_process
from tests.parity.trajectories import BETAS, PROCESS

pytestmark = pytest.mark.parity


def test_schedules_are_the_reference():
    theirs = diffusers.DDIMScheduler(**BETAS).alphas_cumprod.numpy()
    np.testing.assert_allclose(PROCESS.alpha_bar, theirs, rtol=1e-5)
    zero = make_process(ProcessConfig(zero_terminal_snr=True)).alpha_bar
    theirs = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    np.testing.assert_allclose(zero, theirs, rtol=1e-3, atol=1e-6)
    cosine = make_process(ProcessConfig("cosine")).alpha_bar
    theirs = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.numpy()
    np.testing.assert_allclose(cosine, theirs, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [s for s in range(1, 1000) if 1000 % s == 0])
def test_timesteps_are_the_reference_where_steps_divide_the_schedule(num_steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_array_equal(uniform_grid(1000, num_steps)[::-1], scheduler.timesteps.numpy())


@pytest.mark.parametrize("num_steps", [2, 7, 30, 50, 333])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_timesteps_of_other_spacings_are_the_reference(spacing, num_steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    grid = make_grid(PROCESS, num_steps, spacing)
    np.testing.assert_array_equal(grid.times[:-1], scheduler.timesteps.numpy())


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_sigmas_and_fractional_timesteps_are_the_reference(spacing):
    scheduler = diffusers.EulerDiscreteScheduler(
        **BETAS, use_karras_sigmas=spacing == "karras", use_exponential_sigmas=spacing != "karras"
    )
    scheduler.set_timesteps(20)
    grid = make_grid(PROCESS, 20, spacing)
    np.testing.assert_allclose(grid.sigma / grid.alpha, scheduler.sigmas, rtol=1e-4)
    np.testing.assert_allclose(grid.times[:-1], scheduler.timesteps, rtol=1e-4, atol=1e-3)
