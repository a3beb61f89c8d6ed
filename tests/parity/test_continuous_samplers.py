"""Whole trajectories on the straight path and of EDM against diffusers' schedulers.

Differences that stay, each with its reason:

- Its Euler schedulers ask the network before the noise of a churned step is added, at the level
  below; EDM's algorithm 2, and ours, at the raised level of what is then there. They are handed
  what the network predicts there. Its HeunDiscrete has no churn: it gets the raised levels.
- Its DPMSolverMultistep and UniPC begin the straight path a little below t = 1, whose lambda is
  infinite; ours begin at 1 with a step of order 1 and have no counterpart there.
- Its stochastic FlowMatchEuler draws x_t anew from x0 with all its noise: none of ours does.
"""

import functools

import diffusers
import numpy as np
import pytest
import torch

from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.process import ProcessConfig, make_process
from tests.parity import reference
from tests.parity.trajectories import (
    NOISE,
    compare,
    network,
    noisy_step,
    our_trajectory,
    plain_step,
    step_noises,
    their_trajectory,
)

pytestmark = pytest.mark.parity

FLOW = make_process(ProcessConfig("flow"))
EDM = make_process(ProcessConfig("edm", sigma_data=0.5))


@pytest.mark.parametrize("num_steps", [1, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_trajectory_is_the_reference(num_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    grid = make_grid(FLOW, num_steps, f"shifted:{shift}" if shift != 1 else "uniform")
    np.testing.assert_allclose(scheduler.sigmas, grid.sigma, rtol=0, atol=1e-6)
    theirs = their_trajectory(scheduler, np.ones(num_steps + 1), plain_step(scheduler))
    compare(our_trajectory("euler", grid, "velocity"), theirs)


@pytest.mark.parametrize(("num_steps", "spacing"), [(6, "uniform"), (20, "shifted:3")])
def test_flow_heun_trajectory_is_the_reference(num_steps, spacing):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    grid = make_grid(FLOW, num_steps, spacing)

    def twice(x):
        return torch.from_numpy(np.r_[x[:1], np.repeat(x[1:-1], 2), x[-1:]])

    scheduler.sigmas, scheduler.timesteps = twice(grid.sigma), 1000 * twice(grid.times)[:-1]
    theirs = their_trajectory(scheduler, np.ones(1), plain_step(scheduler), repeats=2)
    compare(our_trajectory("heun", grid, "velocity", calls=2), theirs)


MULTISTEP = "EDMDPMSolverMultistepScheduler"


@pytest.mark.parametrize("num_steps", [5, 18])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("euler", "EDMEulerScheduler", {}),
        ("dpmpp_1s", MULTISTEP, {"solver_order": 1}),
        ("dpmpp_2m", MULTISTEP, {"solver_order": 2}),
        ("dpmpp_2m_sde", MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_trajectory_is_the_reference(monkeypatch, name, kind, options, num_steps, spacing):
    scheduler = getattr(diffusers, kind)(sigma_data=0.5, sigma_schedule=spacing, **options)
    scheduler.set_timesteps(num_steps)
    grid = make_grid(EDM, num_steps, spacing)
    np.testing.assert_allclose(scheduler.sigmas, grid.sigma, rtol=1e-5)
    scheduler.sigmas = torch.from_numpy(grid.sigma)
    step = noisy_step(monkeypatch, scheduler, num_steps)
    theirs = their_trajectory(scheduler, grid.sigma[:1], step)
    compare(our_trajectory(name, grid, "preconditioned"), theirs)


CHURNS = {
    "edm-imagenet": (40.0, 0.05, 50.0, 1.003),
    "all": (80.0, 0.0, 1e9, 1.0),  # more than sqrt(2) - 1 of few steps
    "none": (0.0, 0.0, 1e9, 1.0),
}


@functools.cache
def our_churned(churn, num_steps, spacing):
    """The inputs of the network, twice a step and once in the last, and z0."""
    names = ("churn", "churn_from", "churn_to", "inflation")
    options = dict(zip(names, CHURNS[churn], strict=True))
    return our_trajectory("edm", make_grid(EDM, num_steps, spacing), "preconditioned", **options)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize(
    ("churn", "num_steps", "spacing"),
    [
        ("edm-imagenet", 18, "karras"),
        ("edm-imagenet", 8, "exponential"),
        ("all", 18, "exponential"),
        ("all", 5, "karras"),
        ("none", 18, "karras"),
    ],
)
def test_churned_trajectory_is_the_reference(monkeypatch, kind, churn, num_steps, spacing):
    """Their Euler step churns and goes on, and their Heun corrects where that led."""
    amount, low, high, inflation = CHURNS[churn]
    grid, noises = make_grid(EDM, num_steps, spacing), step_noises(num_steps)
    sigma = torch.from_numpy(grid.sigma)
    share = min(amount / num_steps, 2**0.5 - 1)
    gamma = torch.where((low <= sigma) & (sigma <= high), share, 0.0)
    raised = (sigma * (1 + gamma))[:-1]
    edm = diffusers.EDMEulerScheduler(sigma_data=0.5)
    euler = edm if kind == "EDMEulerScheduler" else None
    euler = euler or diffusers.EulerDiscreteScheduler(prediction_type="sample")
    heun = diffusers.HeunDiscreteScheduler(prediction_type="sample")
    for scheduler in (euler, heun):
        scheduler.set_timesteps(num_steps)
        scheduler.set_begin_index(0)
    euler.sigmas = sigma
    heun.sigmas = torch.stack([raised, sigma[1:]], dim=1).flatten()

    def data(z, level):
        raw = network(torch, z * (level**2 + 0.25) ** -0.5, level.log().float() / 4)
        return edm.precondition_outputs(z, raw, level).float()

    z, states = torch.from_numpy(NOISE) * sigma[0].float(), []
    churned_step = noisy_step(monkeypatch, euler, num_steps)
    for i in range(num_steps):
        up = inflation * (raised[i] ** 2 - sigma[i] ** 2) ** 0.5
        z_hat = z + up.float() * noises[i]
        output, t = data(z_hat, raised[i]), torch.tensor(float(i))
        options = dict(s_churn=amount, s_tmin=low, s_tmax=high, s_noise=inflation)
        if euler is edm:
            options["pred_original_sample"] = output
        ahead = churned_step(output, t, z, i, **options).float()
        assert reference.error(heun.step(output, t, z_hat).prev_sample, ahead) < 1e-5
        states += [z_hat, ahead]
        if sigma[i + 1] > 0:
            z = heun.step(data(ahead, sigma[i + 1]), t, ahead).prev_sample.float()
    compare(our_churned(churn, num_steps, spacing), np.stack([s.float().numpy() for s in states]))
