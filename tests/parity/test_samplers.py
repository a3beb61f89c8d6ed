"""Whole trajectories of every sampler against diffusers' schedulers, at the same noise.

Both walk the same grid: the reference is given our times and sigmas in f64 (its own are f32), and
the last tests compare the grids themselves. Differences that stay, each with its reason:

- Where S does not divide T diffusers' leading steps are by the whole part of T / S and end early;
  ours spread over all of T. With steps_offset 1 it has no T-step DDIM (it asks for timestep T);
  ours visits 0..T-1. Its DDIM, PNDM and DDPM step by T // S whatever comes next, so linspace
  is compared for the samplers that read sigmas.
- diffusers' DPMSolverMultistep and UniPC take S of S + 1 linspaced or leading timesteps, leaving
  the last out; ours are spaced alike for every sampler.
- diffusers rounds the timesteps of Karras grids for DPMSolverMultistep; ours are k-diffusion's
  fractional ones, as in its Euler schedulers.
- its Heun always ends on data, so a leading grid, which ends at alpha_bar_0, has no counterpart.
"""

import importlib

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.diffusion.grid import make_grid, uniform_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, at_network, make_process
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.keys import example_keys, key_for, normal_like
from tests.parity import reference

pytestmark = pytest.mark.parity

PROCESS = make_process(ProcessConfig())
FLOW = make_process(ProcessConfig("flow"))
EDM = make_process(ProcessConfig("edm", sigma_data=0.5))
NOISE = reference.draw(0, 3, 4, 4, 2)
KEYS = example_keys(key_for(0, "sampler"), jnp.arange(3))
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
UNCLIPPED = BETAS | dict(clip_sample=False)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(xp, z_t, t):
    """Nonlinear in z_t and t; xp is jax.numpy or torch, t a number."""
    return z_t * (t / 1000) + 0.1 * xp.sin(3 * z_t + t / 150)


def our_trajectory(name, grid, prediction="eps", calls=1, **options):
    """The states [S + 1, B, H, W, C] of a sampler that calls its denoiser `calls` times a step."""
    states, process = [], grid.process

    def watched(z_t, t, cond):
        jax.debug.callback(lambda z: states.append(np.asarray(z)), z_t, ordered=True)
        told = lambda z_t, t, cond: network(jnp, z_t, t.astype(jnp.float32)[0])  # noqa: E731
        return at_network(process, told)(z_t, t, cond)

    predict = predictor(process, prediction, watched)
    sampler = SAMPLERS[name]
    run = jax.jit(lambda z: sampler(predict, grid, z, None, KEYS, **options))
    z0 = run(np.asarray(grid.start(NOISE)))
    jax.effects_barrier()
    return np.stack([*states[::calls], z0])


def step_noises(num_steps):
    """The noise [S, B, H, W, C] that our samplers draw, in the order of the steps."""

    def one(index):
        return normal_like(jax.vmap(jax.random.fold_in, in_axes=(0, None))(KEYS, index), NOISE)

    return torch.from_numpy(np.array(jax.lax.map(one, jnp.arange(num_steps))))


def variance_preserving(scheduler, grid, repeats=1, scaled=False):
    """Puts our grid and the unrounded alpha_bar into a scheduler; returns it and its z / ours."""
    scheduler.set_timesteps(grid.num_steps)
    times = torch.from_numpy(grid.times[:-1].astype(float))
    whole = np.issubdtype(grid.times.dtype, np.integer)
    scheduler.alphas_cumprod = torch.from_numpy(PROCESS.alpha_bar)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(grid.alpha[-1] ** 2)
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.from_numpy(grid.sigma / grid.alpha)
        if repeats == 2:
            times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
            inner = sigmas[1:-1].repeat_interleave(2)
            sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
        scheduler.sigmas = sigmas
        scheduler.timesteps = times.long() if whole and not scaled else times
    return scheduler, (1 / grid.alpha if scaled else np.ones(grid.num_steps + 1))


def their_trajectory(scheduler, scale, step, repeats=1):
    """States in our scale; step(prediction, t, z, index) -> z. Heun's `repeats` are 2."""
    z = torch.from_numpy(NOISE) * float(scale[0])
    states = [z]
    for index, t in enumerate(scheduler.timesteps):
        told = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        z = step(network(torch, told, t.float()), t, z, index)
        states.append(z)
    states = states if repeats == 1 else [*states[:-1][::2], states[-1]]
    return np.stack([s.numpy() for s in states])


def compare(ours, theirs, scale=None):
    if scale is not None:
        theirs = theirs / scale.reshape(-1, 1, 1, 1, 1).astype(np.float32)
    assert ours.shape == theirs.shape
    assert reference.error(ours, theirs) < 1e-5


def plain_step(scheduler):
    return lambda said, t, z, index: scheduler.step(said, t, z).prev_sample


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("num_steps", "eta"), [(1, 0.0), (10, 0.5), (50, 0.0), (250, 0.5)])
def test_ddim_trajectory_is_the_reference(spacing, prediction, num_steps, eta):
    scheduler = diffusers.DDIMScheduler(
        **UNCLIPPED,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        steps_offset=1,
        set_alpha_to_one=spacing == "trailing",
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    assert scheduler.timesteps.tolist() == grid.times[:-1].tolist()
    noises = step_noises(num_steps)

    def step(said, t, z, index):
        noise = noises[index] if eta else None
        return scheduler.step(said, t, z, eta=eta, variance_noise=noise).prev_sample

    ours = our_trajectory("ddim", grid, prediction, eta=eta)
    compare(ours, their_trajectory(scheduler, scale, step))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("num_steps", "spacing"), [(1000, "leading"), (50, "trailing")])
def test_ddpm_trajectory_is_the_reference(monkeypatch, prediction, num_steps, spacing):
    scheduler = diffusers.DDPMScheduler(
        **UNCLIPPED,
        variance_type="fixed_small",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    module, noises = importlib.import_module(type(scheduler).__module__), step_noises(num_steps)

    def step(said, t, z, index):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noises[index])
        return scheduler.step(said, t, z).prev_sample

    compare(our_trajectory("ddpm", grid, prediction), their_trajectory(scheduler, scale, step))


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_plms_trajectory_is_the_reference(num_steps):
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, timestep_spacing="leading", steps_offset=1
    )
    grid = make_grid(PROCESS, num_steps)
    scheduler, scale = variance_preserving(scheduler, grid)
    ours = our_trajectory("plms", grid)
    compare(ours, their_trajectory(scheduler, scale, plain_step(scheduler)))


SIGMA_GRIDS = [(10, "trailing"), (25, "linspace"), (20, "karras"), (12, "exponential")]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("num_steps", "spacing"), [(10, "leading"), *SIGMA_GRIDS])
def test_euler_trajectory_is_the_reference(num_steps, spacing, prediction):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=PREDICTIONS[prediction])
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, scaled=True)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler))
    compare(our_trajectory("euler", grid, prediction), theirs, scale)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("num_steps", "spacing"), [(10, "leading"), *SIGMA_GRIDS])
def test_euler_ancestral_trajectory_is_the_reference(monkeypatch, num_steps, spacing, prediction):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, prediction_type=PREDICTIONS[prediction]
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, scaled=True)
    module, noises = importlib.import_module(type(scheduler).__module__), step_noises(num_steps)

    def step(said, t, z, index):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noises[index])
        return scheduler.step(said, t, z).prev_sample

    theirs = their_trajectory(scheduler, scale, step)
    compare(our_trajectory("euler_ancestral", grid, prediction), theirs, scale)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("num_steps", "spacing"), SIGMA_GRIDS)
def test_heun_trajectory_is_the_reference(num_steps, spacing, prediction):
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=PREDICTIONS[prediction])
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, repeats=2, scaled=True)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler), repeats=2)
    compare(our_trajectory("heun", grid, prediction, calls=2), theirs, scale)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("num_steps", "spacing"), [(10, "leading"), (20, "leading"), *SIGMA_GRIDS])
@pytest.mark.parametrize("name", ["dpmpp_1s", "dpmpp_2m", "dpmpp_2m_sde"])
def test_dpmpp_trajectory_is_the_reference(name, num_steps, spacing, prediction):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        solver_order=1 if name == "dpmpp_1s" else 2,
        algorithm_type="sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++",
        prediction_type=PREDICTIONS[prediction],
        final_sigmas_type="sigma_min" if spacing == "leading" else "zero",
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    noises = step_noises(num_steps)

    def step(said, t, z, index):
        return scheduler.step(said, t, z, variance_noise=noises[index]).prev_sample

    compare(our_trajectory(name, grid, prediction), their_trajectory(scheduler, scale, step))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("num_steps", "spacing"), [(10, "leading"), *SIGMA_GRIDS])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_trajectory_is_the_reference(order, num_steps, spacing, prediction):
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS,
        solver_order=order,
        solver_type="bh2",
        prediction_type=PREDICTIONS[prediction],
        final_sigmas_type="sigma_min" if spacing == "leading" else "zero",
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler))
    ours = our_trajectory("unipc", grid, prediction, order=order)
    compare(ours, theirs)


@pytest.mark.parametrize("num_steps", [1, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_trajectory_is_the_reference(num_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    grid = make_grid(FLOW, num_steps, f"shifted:{shift}" if shift != 1 else "uniform")
    np.testing.assert_allclose(scheduler.sigmas, grid.sigma, rtol=0, atol=1e-6)
    theirs = their_trajectory(scheduler, np.ones(num_steps + 1), plain_step(scheduler))
    compare(our_trajectory("euler", grid, "velocity"), theirs)


@pytest.mark.parametrize("num_steps", [5, 18])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpmpp_1s", "EDMDPMSolverMultistepScheduler", {"solver_order": 1}),
        ("dpmpp_2m", "EDMDPMSolverMultistepScheduler", {"solver_order": 2}),
    ],
)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_trajectory_is_the_reference(name, kind, options, num_steps, spacing):
    scheduler = getattr(diffusers, kind)(sigma_data=0.5, sigma_schedule=spacing, **options)
    scheduler.set_timesteps(num_steps)
    grid = make_grid(EDM, num_steps, spacing)
    np.testing.assert_allclose(scheduler.sigmas, grid.sigma, rtol=1e-5)
    scheduler.sigmas = torch.from_numpy(grid.sigma)
    theirs = their_trajectory(scheduler, grid.sigma[:1], plain_step(scheduler))
    compare(our_trajectory(name, grid, "preconditioned"), theirs)


def test_ending_at_the_data_instead_of_the_first_timestep_is_caught():
    scheduler = diffusers.DDIMScheduler(**UNCLIPPED, timestep_spacing="leading", steps_offset=1)
    grid = make_grid(PROCESS, 10)
    scheduler, scale = variance_preserving(scheduler, grid)
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler))
    assert reference.error(our_trajectory("ddim", grid)[-1], theirs[-1]) > 1e-3


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
