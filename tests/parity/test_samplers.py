"""Whole trajectories of DDIM and DDPM against diffusers' schedulers.

Where they differ: diffusers steps by the whole part of T / S, so for S that does not divide T its
steps end early, and ours spread over all of T; with steps_offset 1 it has no T-step DDIM (it asks
for timestep T), and ours visits 0..T-1. diffusers computes its coefficients in f32, ours are
rounded from f64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.grid import make_grid, uniform_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.keys import example_keys, key_for, normal_like
from tests.parity import reference

pytestmark = pytest.mark.parity

PROCESS = make_process(ProcessConfig())
Z_T = reference.draw(0, 3, 4, 4, 2)
KEYS = example_keys(key_for(0, "sampler"), jnp.arange(3))
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False)


def denoiser(xp, z_t, t):
    """Nonlinear in z_t and t; xp is jax.numpy or torch, t a number."""
    return z_t * (t / 1000) + 0.1 * xp.sin(3 * z_t + t / 150)


def our_trajectory(sampler, num_steps, **options):
    """The states [S + 1, B, H, W, C] of a sampler, and the timesteps [S] that it visits."""
    states, times = [], []

    def record(t, z_t):
        states.append(np.asarray(z_t))
        times.append(int(t))

    def watched(z_t, t, cond):
        jax.debug.callback(record, t[0], z_t, ordered=True)
        return denoiser(jnp, z_t, t[0].astype(jnp.float32))

    grid, predict = make_grid(PROCESS, num_steps), predictor(PROCESS, "eps", watched)
    z0 = jax.jit(lambda z: sampler(predict, grid, z, None, KEYS, **options))(Z_T)
    jax.effects_barrier()
    return np.stack([*states, z0]), times


def step_noises(num_steps):
    """The noise [S, B, H, W, C] that our samplers draw, in the order of the steps."""

    def one(index):
        return normal_like(jax.vmap(jax.random.fold_in, in_axes=(0, None))(KEYS, index), Z_T)

    return torch.from_numpy(np.array(jax.lax.map(one, jnp.arange(num_steps))))


def their_trajectory(scheduler, num_steps, step):
    scheduler.set_timesteps(num_steps)
    noises = step_noises(num_steps)
    z = torch.from_numpy(Z_T)
    states = [z]
    for index, t in enumerate(scheduler.timesteps):
        z = step(denoiser(torch, z, t.float()), t, z, noises[index])
        states.append(z)
    return np.stack([state.numpy() for state in states]), scheduler.timesteps.tolist()


def ddim_scheduler():
    return DDIMScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False
    )


def their_ddim(num_steps, eta):
    scheduler = ddim_scheduler()

    def step(eps, t, z, noise):
        return scheduler.step(eps, t, z, eta=eta, variance_noise=noise if eta else None).prev_sample

    return their_trajectory(scheduler, num_steps, step)


def their_ddpm(monkeypatch):
    scheduler = DDPMScheduler(**BETAS, variance_type="fixed_small")
    # Between neighbouring timesteps f32 leaves 1 - alpha_bar_t / alpha_bar_s four correct digits.
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)

    def step(eps, t, z, noise):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: noise)
        return scheduler.step(eps, t, z).prev_sample

    return their_trajectory(scheduler, 1000, step)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 10, 50, 250])
def test_ddim_trajectory_is_the_reference(num_steps, eta):
    ours, our_times = our_trajectory(samplers.ddim, num_steps=num_steps, eta=eta)
    theirs, their_times = their_ddim(num_steps, eta)
    assert our_times == their_times
    assert reference.error(ours, theirs) < 1e-5


def test_ddpm_trajectory_is_the_reference(monkeypatch):
    ours, our_times = our_trajectory(samplers.ddpm, num_steps=1000)
    theirs, their_times = their_ddpm(monkeypatch)
    assert our_times == their_times
    assert reference.error(ours, theirs) < 1e-5


def test_ending_at_the_data_instead_of_the_first_timestep_is_caught():
    scheduler = ddim_scheduler()
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    step = lambda eps, t, z, noise: scheduler.step(eps, t, z).prev_sample  # noqa: E731
    theirs, _ = their_trajectory(scheduler, 10, step)
    ours, _ = our_trajectory(samplers.ddim, num_steps=10)
    assert reference.error(ours[-1], theirs[-1]) > 1e-3


def test_schedule_is_the_reference():
    theirs = ddim_scheduler().alphas_cumprod.numpy()
    np.testing.assert_allclose(PROCESS.alpha_bar, theirs, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [s for s in range(1, 1000) if 1000 % s == 0])
def test_timesteps_are_the_reference_where_steps_divide_the_schedule(num_steps):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(num_steps)
    grid = uniform_grid(1000, num_steps)[::-1]
    np.testing.assert_array_equal(grid, scheduler.timesteps.numpy())
