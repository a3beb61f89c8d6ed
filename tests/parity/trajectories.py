"""Whole trajectories of our samplers and of diffusers' schedulers: same network, grid and noise."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, at_network, make_process
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.keys import example_keys, key_for, normal_like
from tests.parity import reference

PROCESS = make_process(ProcessConfig())
NOISE = reference.draw(0, 3, 4, 4, 2)
KEYS = example_keys(key_for(0, "sampler"), jnp.arange(3))
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(xp, z_t, t):
    """Nonlinear in z_t and t; xp is jax.numpy or torch, t a number."""
    return z_t * (t / 1000) + 0.1 * xp.sin(3 * z_t + t / 150)


def our_trajectory(name, grid, prediction="eps", calls=1, learned=None, **options):
    """The states [S + 1, B, H, W, C] of a sampler that calls its denoiser `calls` times a step.

    `learned` makes of z_t the variance that the denoiser predicts beside its prediction.
    """
    states, process = [], grid.process
    denoiser = at_network(process, lambda z, t, cond: network(jnp, z, t.astype(jnp.float32)[0]))

    def watched(z_t, t, cond):
        jax.debug.callback(lambda z: states.append(np.asarray(z)), z_t, ordered=True)
        output = denoiser(z_t, t, cond)
        return jnp.concatenate([output, learned(z_t)], axis=-1) if learned else output

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
    if hasattr(scheduler, "one"):
        scheduler.one = torch.tensor(grid.alpha[-1] ** 2)  # DDPM's name for it
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
        scaled_input = (
            scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        )
        z = step(network(torch, scaled_input, t.float()), t, z, index)
        states.append(z)
    states = states if repeats == 1 else [*states[:-1][::2], states[-1]]
    return np.stack([s.numpy() for s in states])


def compare(ours, theirs, scale=None):
    """Every state of the trajectory is theirs, within 1e-5 of that state's largest value."""
    if scale is not None:
        theirs = theirs / scale.reshape(-1, 1, 1, 1, 1).astype(np.float32)
    assert ours.shape == theirs.shape
    errors = [reference.error(*states) for states in zip(ours, theirs, strict=True)]
    assert max(errors) < 1e-5, [f"{e:.1e}" for e in errors]


def plain_step(scheduler):
    return lambda output, t, z, index: scheduler.step(output, t, z).prev_sample


def noisy_step(monkeypatch, scheduler, num_steps, arranged=lambda noise: noise):
    """A step of a scheduler that draws by itself, made to draw our noise."""
    module, noises = importlib.import_module(type(scheduler).__module__), step_noises(num_steps)

    def step(output, t, z, index, **options):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: arranged(noises[index]))
        return scheduler.step(output, t, z, **options).prev_sample

    return step
