"""Laws of learned variances: range, bound, whom its gradient reaches, and who draws with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.gradient_guidance import gradient
from ldm_jax.diffusion.grid import Grid, make_grid
from ldm_jax.diffusion.guidance import extrapolate, guide, in_x0, interval, null_and_cond
from ldm_jax.diffusion.learned_variance import hybrid_vlb, log_variance, posterior, split
from ldm_jax.diffusion.objective import Objective, check, denoising_loss
from ldm_jax.diffusion.parameterisation import clipped, dynamically_clipped, predictor
from ldm_jax.diffusion.process import ProcessConfig, corrupt, make_process
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.tiling import tiled
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for, normal_like

PROCESS = make_process(ProcessConfig("ddpm_linear", 1000, 1e-4, 0.02))
T = jnp.array([1, 5, 20])
SHAPE = (3, 2, 2, 2)
Z0, NOISE = (jax.random.normal(key_for(0, name), SHAPE) for name in ("z0", "noise"))


def test_variance_lies_between_the_posterior_and_beta():
    alpha_bar = PROCESS.alpha_bar
    t = np.asarray(T)
    beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
    low = beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    for v, expected in ((-1.0, low), (1.0, beta), (0.0, np.sqrt(low * beta))):
        got = np.exp(log_variance(PROCESS, jnp.full(SHAPE, v), T))[:, 0, 0, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_bound_is_zero_for_the_truth_and_positive_elsewhere():
    z_t = corrupt(PROCESS, Z0, NOISE, T)
    truth = hybrid_vlb(PROCESS, Z0, z_t, NOISE, -jnp.ones(SHAPE), T)
    np.testing.assert_allclose(truth, 0, atol=2e-4)
    for eps, v in ((NOISE + 0.5, -1.0), (NOISE, 0.0)):
        assert np.all(hybrid_vlb(PROCESS, Z0, z_t, eps, jnp.full(SHAPE, v), T) > truth + 1e-6)


def posterior_by_hand(z0, z_t):
    """(mean, variance) of q(z_(t-1) | z_t, z0) in f64, from DDPM eq. 7."""
    t = np.asarray(T)
    now, before = (PROCESS.alpha_bar[s].reshape(3, 1, 1, 1) for s in (t, t - 1))
    beta = 1 - now / before
    mean = np.sqrt(before) * beta * z0 + np.sqrt(1 - beta) * (1 - before) * z_t
    return mean / (1 - now), beta * (1 - before) / (1 - now)


def test_posterior_is_ddpms():
    z_t = np.float64(corrupt(PROCESS, Z0, NOISE, T))
    mean, _ = posterior_by_hand(np.float64(Z0), z_t)
    np.testing.assert_allclose(posterior(PROCESS, Z0, jnp.asarray(z_t), T), mean, atol=2e-6)


def test_bound_is_the_divergence_of_two_normals():
    z_t, wrong, v = np.float64(corrupt(PROCESS, Z0, NOISE, T)), NOISE + 0.5, jnp.full(SHAPE, 0.4)
    alpha_bar = PROCESS.alpha_bar[np.asarray(T)].reshape(3, 1, 1, 1)
    x0 = (z_t - np.sqrt(1 - alpha_bar) * np.float64(wrong)) / np.sqrt(alpha_bar)
    (mean, low), (guess, _) = posterior_by_hand(np.float64(Z0), z_t), posterior_by_hand(x0, z_t)
    beta = 1 - alpha_bar / PROCESS.alpha_bar[np.asarray(T) - 1].reshape(3, 1, 1, 1)
    variance = beta**0.7 * low**0.3  # IDDPM eq. 15 at v = 0.4
    # KL(N(mean, low) || N(guess, variance))
    kl = (np.log(variance / low) + (low + (mean - guess) ** 2) / variance - 1) / 2
    got = hybrid_vlb(PROCESS, Z0, jnp.asarray(z_t), wrong, v, T)
    np.testing.assert_allclose(got, kl.mean(axis=(1, 2, 3)), rtol=1e-3)


def test_variance_at_the_data_end_is_cut_to_that_of_the_next_timestep():
    """IDDPM, section 3.1: the posterior's own is 0 there."""
    alpha_bar = PROCESS.alpha_bar
    expected = (1 - alpha_bar[1] / alpha_bar[0]) * (1 - alpha_bar[0]) / (1 - alpha_bar[1])
    got = log_variance(PROCESS, -jnp.ones(SHAPE), jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(np.exp(got), expected, rtol=1e-4)


def test_bound_at_the_data_end_is_the_density_of_a_normal():
    t = jnp.zeros(3, jnp.int32)
    z_t, v = corrupt(PROCESS, Z0, NOISE, t), jnp.full(SHAPE, 0.3)
    mean, log_var = (np.float64(x) for x in (Z0, log_variance(PROCESS, v, t)))
    value = hybrid_vlb(PROCESS, Z0, z_t, NOISE, v, t)
    np.testing.assert_allclose(posterior(PROCESS, Z0, z_t, t), mean, atol=1e-6)
    expected = (np.log(2 * np.pi) + log_var).mean(axis=(1, 2, 3)) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    # A mean that is off by e costs e^2 / 2 sigma^2 more.
    off = hybrid_vlb(PROCESS, Z0 + 0.1, z_t, NOISE, v, t)
    extra = (0.01 * np.exp(-log_var)).mean(axis=(1, 2, 3)) / 2
    np.testing.assert_allclose(off - value, extra, rtol=2e-2)


def test_gradient_reaches_the_variance_alone():
    z_t = corrupt(PROCESS, Z0, NOISE, T)

    def bound(eps, v):
        return hybrid_vlb(PROCESS, Z0, z_t, eps, v, T).sum()

    of_eps, of_v = jax.grad(bound, argnums=(0, 1))(NOISE + 0.1, jnp.zeros(SHAPE))
    assert not np.any(of_eps) and np.all(of_v != 0)


@pytest.mark.parametrize("channels", [2, 6])
def test_prediction_is_noise_then_variance(channels):
    both = jnp.arange(channels).reshape(1, 1, 1, -1)
    eps, v = split(both)
    np.testing.assert_array_equal(jnp.concatenate([eps, v], axis=-1), both)
    assert eps.shape[-1] == channels // 2


def eps_of(z_t, t, cond):
    shift = 0.0 if cond is None else cond
    return 0.5 * jnp.tanh(z_t) + jnp.sin(t / 50).reshape(-1, 1, 1, 1) + shift


def v_of(z_t, t, cond):
    return jnp.cos(3 * z_t) + (0.0 if cond is None else 10 * cond)


def both(z_t, t, cond):
    return jnp.concatenate([eps_of(z_t, t, cond), v_of(z_t, t, cond)], axis=-1)


def losses(denoiser, objective):
    data = {"z0": Z0, "noise": NOISE, "t": T, "cond": None}
    return denoising_loss(denoiser, PROCESS, objective, **data).loss


def test_hybrid_loss_is_the_plain_one_and_the_bound_of_all_timesteps_in_bits():
    learned = Objective(learned_variance=True)
    z_t = corrupt(PROCESS, Z0, NOISE, T)
    plain = losses(eps_of, Objective())
    bound = hybrid_vlb(PROCESS, Z0, z_t, eps_of(z_t, T, None), v_of(z_t, T, None), T)
    hybrid = losses(both, learned)
    np.testing.assert_allclose(hybrid, plain + 0.001 * 1000 * bound / np.log(2), rtol=1e-5)


def test_channels_weigh_in_the_bound_as_their_weights_say():
    learned = Objective(learned_variance=True)

    def loss(channels, weights):
        data = {"z0": Z0[..., channels], "noise": NOISE[..., channels], "t": T, "cond": None}
        return denoising_loss(both, PROCESS, learned, **data, channel_weights=weights).loss

    whole, first = slice(None), slice(0, 1)
    assert Z0.shape[-1] == 2
    np.testing.assert_allclose(loss(whole, np.array([3.0, 3.0])), loss(whole, None), rtol=1e-5)
    np.testing.assert_allclose(loss(whole, np.array([1.0, 0.0])), loss(first, None), rtol=1e-5)


def test_hybrid_loss_teaches_eps_the_plain_loss_and_v_the_bound():
    def loss(by, objective, denoiser):
        return losses(lambda z_t, t, cond: denoiser(z_t, t, cond) * by, objective).sum()

    by = jnp.linspace(0.5, 1.5, 4).reshape(1, 1, 1, 4)
    got = jax.grad(loss)(by, Objective(learned_variance=True), both)
    plain = jax.grad(loss)(by[..., :2], Objective(), eps_of)
    np.testing.assert_allclose(got[..., :2], plain, rtol=1e-5)
    assert np.all(np.abs(got[..., 2:]) > 1e-6)


def test_objective_refuses_what_has_no_learned_variance():
    flow = make_process(ProcessConfig("flow"))
    for process, name in ((PROCESS, "v"), (flow, "velocity")):
        with pytest.raises(InputError, match=f"learned_variance is of .* not of '{name}'"):
            check(process, Objective(name, learned_variance=True))
    with pytest.raises(AssertionError, match="twice with learned_variance"):
        losses(eps_of, Objective(learned_variance=True))


def drawn(name, denoiser, grid, wrap=lambda predict: predict):
    predict = wrap(predictor(PROCESS, "eps", denoiser))
    keys = example_keys(key_for(0, "sampler"), jnp.arange(3))
    return jax.jit(lambda z: SAMPLERS[name](predict, grid, z, None, keys))(Z0)


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"edm", "sde_flow", "ddpm"}))
def test_other_samplers_see_eps_alone(name):
    grid = make_grid(PROCESS, 3)
    np.testing.assert_array_equal(drawn(name, both, grid), drawn(name, eps_of, grid))


def test_ddpm_draws_with_the_learned_variance():
    """Against IDDPM's steps, over some neighbouring timesteps of the whole chain."""
    times = np.array([9, 8, 7, 6])
    grid = Grid(PROCESS, times.astype(np.int32), PROCESS.alpha[times], PROCESS.sigma[times])
    keys, z_t = example_keys(key_for(0, "sampler"), jnp.arange(3)), Z0
    for index, time in enumerate(times[:-1]):
        t = jnp.full(3, time)
        x0 = (z_t - PROCESS.sigma[time] * eps_of(z_t, t, None)) / PROCESS.alpha[time]
        mean = posterior(PROCESS, x0, z_t, t)
        noise = normal_like(jax.vmap(lambda k, i=index: jax.random.fold_in(k, i))(keys), z_t)
        z_t = mean + jnp.exp(log_variance(PROCESS, v_of(z_t, t, None), t) / 2) * noise
    np.testing.assert_allclose(drawn("ddpm", both, grid), z_t, atol=2e-5)
    assert np.abs(drawn("ddpm", eps_of, grid) - z_t).max() > 1e-3


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_at_the_lower_end_is_ddpm_on_grids_of_few_steps(spacing):
    grid = make_grid(PROCESS, 5, spacing)

    def lower(z_t, t, cond):
        return jnp.concatenate([eps_of(z_t, t, cond), -jnp.ones_like(z_t)], axis=-1)

    np.testing.assert_allclose(drawn("ddpm", lower, grid), drawn("ddpm", eps_of, grid), atol=1e-6)
    assert np.isfinite(drawn("ddpm", both, grid)).all()


@pytest.mark.parametrize(
    "wrap",
    [lambda p: clipped(p, PROCESS, 0.5), lambda p: dynamically_clipped(p, PROCESS)],
    ids=["clipped", "dynamically_clipped"],
)
def test_clipping_keeps_the_learned_variance(wrap):
    z_t = corrupt(PROCESS, Z0, NOISE, T)
    x0, eps, v = wrap(predictor(PROCESS, "eps", both))(z_t, T, None)
    np.testing.assert_array_equal(v, v_of(z_t, T, None))
    plain = wrap(predictor(PROCESS, "eps", eps_of))(z_t, T, None)
    np.testing.assert_array_equal(jnp.stack([x0, eps]), jnp.stack(plain))


def guides(denoiser):
    contrast = null_and_cond(denoiser, jnp.full((1, 1, 1, 1), -0.3))
    in_z0 = in_x0(extrapolate(2.0), lambda z, p, t: 2 * z - p, lambda z, x0, t: 2 * z - x0)
    return {
        "scale": guide(contrast, extrapolate(2.0)),
        "interval": interval(contrast, in_z0, 3, 10),
        "tiles": tiled(denoiser, 2, 1),
        "gradient": gradient(
            denoiser,
            lambda z, p, t: z - p,
            lambda z, x0, t: -jnp.sum(x0**2, (1, 2, 3)),
            jnp.cos,
            2.0,
        ),
    }


@pytest.mark.parametrize("name", ["scale", "interval", "tiles", "gradient"])
def test_guidance_guides_eps_and_keeps_the_conditional_variance(name):
    cond = jnp.linspace(0.1, 0.5, 3).reshape(3, 1, 1, 1)
    eps, v = split(guides(both)[name](Z0, T, cond))
    np.testing.assert_allclose(eps, guides(eps_of)[name](Z0, T, cond), atol=1e-6)
    np.testing.assert_allclose(v, v_of(Z0, T, cond), atol=1e-6)
