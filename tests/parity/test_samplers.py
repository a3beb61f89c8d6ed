"""Whole trajectories of the samplers of timesteps against diffusers' schedulers, at the same noise.

Both walk the same grid: the reference takes our times and sigmas in f64 (its own are f32), and
test_grids.py compares the grids themselves. Differences that stay, each with its reason:

- Its DDIM and PNDM step by T // S whatever comes next, so linspace is compared for the others.
- Its PNDM extrapolates what the network predicts, which for v is another thing than its noise; ours
  extrapolates the noise (PNDM, eq. 12). It is handed the noise that v implies, and knows no x0.
- Its EulerAncestral knows no x0 either.
- Its Heun always ends on data, so a leading grid, which ends at alpha_bar_0, has no counterpart.
- Its DDPM with learned variances draws noise in a step onto data itself, of a variance between beta
  and a floor of 1e-20; ours draws none there. Grids that end at alpha_bar_0 or at timestep 0 do not
  show it.
"""

import diffusers
import jax.numpy as jnp
import pytest
import torch

from ldm_jax.diffusion.grid import make_grid
from tests.parity import reference
from tests.parity.trajectories import (
    BETAS,
    PREDICTIONS,
    PROCESS,
    compare,
    noisy_step,
    our_trajectory,
    plain_step,
    step_noises,
    their_trajectory,
    variance_preserving,
)

pytestmark = pytest.mark.parity

UNCLIPPED = BETAS | dict(clip_sample=False)


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

    def step(output, t, z, index):
        noise = noises[index] if eta else None
        return scheduler.step(output, t, z, eta=eta, variance_noise=noise).prev_sample

    ours = our_trajectory("ddim", grid, prediction, eta=eta)
    compare(ours, their_trajectory(scheduler, scale, step))


DDPM = [(1000, "leading"), (50, "leading"), (50, "trailing"), (10, "linspace")]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("num_steps", "spacing"), DDPM)
def test_ddpm_trajectory_is_the_reference(monkeypatch, prediction, num_steps, spacing):
    scheduler = diffusers.DDPMScheduler(
        **UNCLIPPED,
        variance_type="fixed_small",
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
        steps_offset=int(num_steps < 1000),
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    assert scheduler.timesteps.tolist() == grid.times[:-1].tolist()
    step = noisy_step(monkeypatch, scheduler, num_steps)
    compare(our_trajectory("ddpm", grid, prediction), their_trajectory(scheduler, scale, step))


def variance(xp, z_t):
    return xp.cos(4 * z_t)


@pytest.mark.parametrize(("num_steps", "spacing"), [(1000, "leading"), (25, "leading")])
def test_ddpm_trajectory_of_learned_variances_is_the_reference(monkeypatch, num_steps, spacing):
    scheduler = diffusers.DDPMScheduler(
        **UNCLIPPED,
        variance_type="learned_range",
        timestep_spacing=spacing,
        steps_offset=int(num_steps < 1000),
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)
    first, last = lambda x: x.movedim(-1, 1), lambda x: x.movedim(1, -1)
    plain = noisy_step(monkeypatch, scheduler, num_steps, first)

    def step(output, t, z, index):
        both = torch.cat([first(output), first(variance(torch, z))], dim=1)
        return last(plain(both, t, first(z), index))

    ours = our_trajectory("ddpm", grid, learned=lambda z: variance(jnp, z))
    compare(ours, their_trajectory(scheduler, scale, step))


@pytest.mark.parametrize(
    ("num_steps", "spacing", "prediction"),
    [
        *((count, "leading", "eps") for count in (2, 10, 50)),
        (10, "leading", "v"),
        (10, "trailing", "eps"),
        (50, "trailing", "v"),
    ],
)
def test_plms_trajectory_is_the_reference(num_steps, spacing, prediction):
    scheduler = diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, timestep_spacing=spacing, steps_offset=1
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid)

    def step(output, t, z, index):
        alpha_bar = scheduler.alphas_cumprod[t]
        if prediction == "v":
            output = alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * z
        return scheduler.step(output, t, z).prev_sample

    theirs = their_trajectory(scheduler, scale, step)
    compare(our_trajectory("plms", grid, prediction), theirs)


SIGMA_GRIDS = [(10, "trailing"), (25, "linspace"), (20, "karras"), (12, "exponential")]
TO_DATA = [
    *((*grid, prediction) for grid in SIGMA_GRIDS for prediction in ("eps", "v")),
    (2, "trailing", "eps"),
    (50, "trailing", "x0"),
    (5, "karras", "x0"),
]
LEADING = [(10, "leading", "eps"), (10, "leading", "v"), (50, "leading", "x0")]
WITHOUT_X0 = [case for case in [*LEADING, *TO_DATA] if case[2] != "x0"]


@pytest.mark.parametrize(("num_steps", "spacing", "prediction"), [*LEADING, *TO_DATA])
def test_euler_trajectory_is_the_reference(num_steps, spacing, prediction):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=PREDICTIONS[prediction])
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, scaled=True)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler))
    compare(our_trajectory("euler", grid, prediction), theirs, scale)


@pytest.mark.parametrize(("num_steps", "spacing", "prediction"), WITHOUT_X0)
def test_euler_ancestral_trajectory_is_the_reference(monkeypatch, num_steps, spacing, prediction):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, prediction_type=PREDICTIONS[prediction]
    )
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, scaled=True)
    step = noisy_step(monkeypatch, scheduler, num_steps)
    theirs = their_trajectory(scheduler, scale, step)
    compare(our_trajectory("euler_ancestral", grid, prediction), theirs, scale)


@pytest.mark.parametrize(("num_steps", "spacing", "prediction"), TO_DATA)
def test_heun_trajectory_is_the_reference(num_steps, spacing, prediction):
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, prediction_type=PREDICTIONS[prediction])
    grid = make_grid(PROCESS, num_steps, spacing)
    scheduler, scale = variance_preserving(scheduler, grid, repeats=2, scaled=True)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler), repeats=2)
    compare(our_trajectory("heun", grid, prediction, calls=2), theirs, scale)


@pytest.mark.parametrize(
    ("num_steps", "spacing", "prediction"), [(20, "leading", "eps"), *LEADING, *TO_DATA]
)
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

    def step(output, t, z, index):
        return scheduler.step(output, t, z, variance_noise=noises[index]).prev_sample

    compare(our_trajectory(name, grid, prediction), their_trajectory(scheduler, scale, step))


@pytest.mark.parametrize(("num_steps", "spacing", "prediction"), [*LEADING, *TO_DATA])
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


def test_ending_at_the_data_instead_of_the_first_timestep_is_caught():
    scheduler = diffusers.DDIMScheduler(**UNCLIPPED, timestep_spacing="leading", steps_offset=1)
    grid = make_grid(PROCESS, 10)
    scheduler, scale = variance_preserving(scheduler, grid)
    scheduler.final_alpha_cumprod = torch.tensor(1.0)
    theirs = their_trajectory(scheduler, scale, plain_step(scheduler))
    assert reference.error(our_trajectory("ddim", grid)[-1], theirs[-1]) > 1e-3
