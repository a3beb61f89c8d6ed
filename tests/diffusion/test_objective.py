"""Laws of the timestep draw and of the denoising loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.noise_levels import NoiseLevels, uniform_timesteps
from ldm_jax.diffusion.objective import (
    LOSSES,
    WEIGHTS,
    Objective,
    denoising_loss,
    direction_error,
    offset,
    weight,
)
from ldm_jax.diffusion.parameterisation import target
from ldm_jax.diffusion.process import ProcessConfig, corrupt, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for

PROCESS = make_process(ProcessConfig())
T = jnp.array([0, 300, 999], jnp.int32)
Z0 = jax.random.normal(key_for(0, "z0"), (3, 8, 8, 16))
NOISE = jax.random.normal(key_for(0, "noise"), (3, 8, 8, 16))


def denoised(denoiser, process=PROCESS, objective=Objective(), t=T, cond=None, **options):
    data = {"z0": Z0, "noise": NOISE, "t": t, "cond": cond}
    return denoising_loss(denoiser, process, objective, **data, **options)


def losses(*arguments, **options):
    return denoised(*arguments, **options).loss


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_the_true_noise_is_zero(loss):
    value = losses(lambda z_t, t, cond: NOISE, penalty=loss)
    np.testing.assert_array_equal(value, np.zeros(3))


@pytest.mark.parametrize(("loss", "expected"), [("l2", 1.0), ("l1", (2 / np.pi) ** 0.5)])
def test_loss_of_the_zero_predictor_is_the_moment_of_a_normal(loss, expected):
    value = losses(lambda z_t, t, cond: 0 * z_t, penalty=loss)
    np.testing.assert_allclose(value, np.full(3, expected), rtol=0.15)


@pytest.mark.parametrize(("loss", "penalty"), [("l2", np.square), ("l1", np.abs)])
def test_loss_equals_the_formula_written_by_hand(loss, penalty):
    cond = {"shift": jnp.array([0.5, -1.0, 2.0])}

    def denoiser(z_t, t, cond):
        return z_t * (t.reshape(3, 1, 1, 1) / 1000) + cond["shift"].reshape(3, 1, 1, 1)

    value = losses(denoiser, cond=cond, penalty=loss)
    z0, noise, shift = (np.asarray(a, np.float64) for a in (Z0, NOISE, cond["shift"]))
    for row, t in enumerate([0, 300, 999]):
        alpha_bar = PROCESS.alpha_bar[t]
        z_t = alpha_bar**0.5 * z0[row] + (1 - alpha_bar) ** 0.5 * noise[row]
        expected = penalty(z_t * t / 1000 + shift[row] - noise[row]).mean()
        assert value[row] == pytest.approx(expected, rel=1e-5)


def test_loss_is_f32_when_the_denoiser_answers_in_bf16():
    value = losses(lambda z_t, t, cond: NOISE.astype(jnp.bfloat16))
    assert value.dtype == jnp.float32
    rounding = np.asarray(NOISE.astype(jnp.bfloat16), np.float64) - np.asarray(NOISE, np.float64)
    np.testing.assert_allclose(value, np.square(rounding).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_loss_refuses_a_prediction_that_would_broadcast():
    with pytest.raises(AssertionError, match=r"\(3, 8, 8, 1\)"):
        losses(lambda z_t, t, cond: z_t[..., :1])


def test_loss_refuses_an_unknown_name():
    with pytest.raises(InputError, match=r"'huber'.*l1.*l2"):
        losses(lambda z_t, t, cond: z_t, penalty="huber")


def test_timesteps_are_uniform():
    count, bins = 20_000, 20
    t = uniform_timesteps(example_keys(key_for(0, "t"), jnp.arange(count)), 1000)
    assert t.dtype == jnp.int32
    assert t.min() == 0
    assert t.max() == 999
    observed = np.bincount(np.asarray(t) * bins // 1000, minlength=bins)
    chi_square = np.sum((observed - count / bins) ** 2 / (count / bins))
    assert chi_square < 43.8  # the 99.9 % point of 19 degrees of freedom


def test_timesteps_depend_on_their_own_key_only():
    key = key_for(0, "t")
    whole = uniform_timesteps(example_keys(key, jnp.arange(64)), 1000)
    some = np.array([63, 7, 8])
    np.testing.assert_array_equal(uniform_timesteps(example_keys(key, some), 1000), whole[some])


DISCRETE, FLOW, EDM = (
    PROCESS,
    make_process(ProcessConfig("flow")),
    make_process(ProcessConfig("edm")),
)


def weights(process, t, parameterisation, name, **fields):
    objective = Objective(parameterisation, name, **fields)
    return np.asarray(weight(process, objective, jnp.asarray(t)), np.float64)


def test_min_snr_has_the_published_forms():
    t = np.array([5, 150, 400, 900])
    snr = DISCRETE.alpha_bar[t] / (1 - DISCRETE.alpha_bar[t])
    kept = np.minimum(snr, 5)
    for name, expected in (("x0", kept), ("eps", kept / snr), ("v", kept / (snr + 1))):
        np.testing.assert_allclose(weights(DISCRETE, t, name, "min_snr"), expected, rtol=2e-4)
    u = np.array([0.1, 0.5, 0.9])
    expected = u**2 * np.minimum(((1 - u) / u) ** 2, 2.0)
    got = weights(FLOW, u, "velocity", "min_snr", min_snr_gamma=2.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_snr_plus_one_is_the_plain_loss_of_v():
    t = np.array([0, 500, 999])
    np.testing.assert_allclose(weights(DISCRETE, t, "v", "snr_plus_one"), 1, rtol=1e-5)
    snr = DISCRETE.alpha_bar[t] / (1 - DISCRETE.alpha_bar[t])
    np.testing.assert_allclose(weights(DISCRETE, t, "x0", "snr_plus_one"), snr + 1, rtol=1e-4)


def test_edm_weight_is_edms_and_the_plain_loss_of_its_network():
    process, s = make_process(ProcessConfig("edm", sigma_data=0.5)), np.array([0.01, 0.5, 60.0])
    expected = (s**2 + 0.25) / (s * 0.5) ** 2
    np.testing.assert_allclose(weights(process, s, "x0", "edm"), expected, rtol=1e-5)
    np.testing.assert_allclose(weights(process, s, "preconditioned", "edm"), 1, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "simple"])
def test_weight_is_of_the_error_of_x0_whatever_is_predicted(name):
    t, wrong = jnp.array([0.2, 0.5, 0.8]), Z0 + 0.3 * NOISE
    by_prediction = []
    for parameterisation in ("x0", "v", "velocity", "preconditioned"):
        z_t = corrupt(FLOW, Z0, NOISE, t)
        time = np.reshape(t, (3, 1, 1, 1))
        eps = (z_t - (1 - time) * wrong) / time  # the noise that z_t has if its data is `wrong`
        prediction = target(FLOW, parameterisation, wrong, eps, t)
        objective = Objective(parameterisation, name)
        by_prediction.append(losses(lambda z, t, c, p=prediction: p, FLOW, objective, t))
    for loss in by_prediction[1:]:
        np.testing.assert_allclose(loss, by_prediction[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["x0", "v", "velocity", "preconditioned"])
def test_true_target_gives_the_data_back(name):
    t = jnp.array([0.2, 0.5, 0.8])
    truth = target(FLOW, name, Z0, NOISE, t)
    estimate = denoised(lambda z_t, t, c: truth, FLOW, Objective(name), t).x0
    np.testing.assert_allclose(estimate, Z0, rtol=0, atol=2e-5)


def test_data_estimated_from_a_velocity_is_a_straight_step_away():
    t = jnp.array([0.2, 0.5, 0.8])
    time = np.float64(t).reshape(3, 1, 1, 1)
    expected = (1 - time) * np.float64(Z0) + time * np.float64(NOISE) - time * 3.0  # z_t - t v
    estimate = denoised(lambda z_t, t, c: 0 * z_t + 3, FLOW, Objective("velocity"), t).x0
    np.testing.assert_allclose(estimate, expected, rtol=0, atol=2e-6)


def test_data_estimated_from_noise_is_f32_and_ddpms():
    alpha_bar = PROCESS.alpha_bar[np.asarray(T)].reshape(3, 1, 1, 1)
    z_t = np.sqrt(alpha_bar) * np.float64(Z0) + np.sqrt(1 - alpha_bar) * np.float64(NOISE)
    expected = (z_t - np.sqrt(1 - alpha_bar) * 0.5) / np.sqrt(alpha_bar)  # DDPM eq. 15
    estimate = denoised(lambda z_t, t, c: jnp.full(z_t.shape, 0.5, jnp.bfloat16)).x0
    assert estimate.dtype == jnp.float32
    np.testing.assert_allclose(estimate, expected, rtol=1e-5, atol=1e-4)


def test_unused_estimate_of_the_data_leaves_the_gradient_finite():
    """Also where the noise end has no data in it, and the data end no noise."""

    def loss(by):
        ends = jnp.array([0.0, 0.5, 1.0])
        return losses(lambda z_t, t, c: by * z_t, FLOW, Objective("x0"), ends).sum()

    assert np.isfinite(jax.grad(loss)(jnp.float32(0.5)))


def test_weight_is_finite_at_both_ends():
    zero = make_process(ProcessConfig(zero_terminal_snr=True))
    for name in WEIGHTS:
        for process, t in ((zero, np.array([0, 999])), (FLOW, np.array([0.0, 1.0]))):
            assert np.isfinite(weights(process, t, "v", name)).all()
    assert weights(zero, np.array([999]), "v", "min_snr") == pytest.approx(1)


def test_learned_uncertainty_is_least_at_the_logarithm_of_the_loss():
    objective = Objective("preconditioned", "edm", noise_levels=NoiseLevels("log_normal"))
    t = jnp.array([0.1, 1.0, 10.0])

    def zero(z_t, t, cond):
        return 0 * z_t

    def loss(u):
        return losses(zero, EDM, objective, t, uncertainty=lambda t: u)

    plain = losses(zero, EDM, objective, t)
    np.testing.assert_allclose(loss(jnp.zeros(3)), plain, rtol=1e-6)
    slope = jax.grad(lambda u: loss(u).sum())(jnp.log(plain))
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_direction_term_sees_the_direction_alone():
    a, b = Z0, NOISE
    np.testing.assert_allclose(direction_error(a, 3 * a), 0, atol=1e-5)
    np.testing.assert_allclose(direction_error(a, -a), 2, atol=1e-5)
    np.testing.assert_allclose(direction_error(a, b), direction_error(5 * a, b), atol=1e-5)
    objective = Objective("velocity", cosine_weight=0.5)
    t = jnp.array([0.2, 0.5, 0.8])

    def run(objective):
        return losses(lambda z_t, t, c: z_t, FLOW, objective, t)

    extra = run(objective) - run(Objective("velocity"))
    z_t = corrupt(FLOW, Z0, NOISE, t)
    a, b = np.float64(z_t), np.float64(NOISE - Z0)
    cos = (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    np.testing.assert_allclose(extra, 0.5 * (1 - cos).mean(axis=(1, 2)), rtol=1e-4)


@pytest.mark.parametrize("penalty", LOSSES)
def test_channels_weigh_in_the_mean_and_the_direction_as_their_weights_say(penalty):
    objective = Objective("velocity", "min_snr", cosine_weight=0.5)
    t, count = jnp.array([0.2, 0.5, 0.8]), 6

    def loss(channels, weights):
        data = {"z0": Z0[..., :channels], "noise": NOISE[..., :channels], "t": t, "cond": None}
        more = {"penalty": penalty, "channel_weights": weights}
        return denoising_loss(lambda z, t, c: 0.3 * z, FLOW, objective, **data, **more).loss

    whole = loss(16, None)
    np.testing.assert_allclose(loss(16, np.full(16, 7.0)), whole, rtol=1e-5)
    first = np.repeat([1.0, 0.0], (count, 16 - count))
    np.testing.assert_allclose(loss(16, first), loss(count, None), rtol=1e-5)
    # Weights that are whole numbers count a channel as often.
    data = {"z0": Z0[..., [0, 0, 1]], "noise": NOISE[..., [0, 0, 1]], "t": t, "cond": None}
    twice = denoising_loss(lambda z, t, c: 0.3 * z, FLOW, objective, penalty=penalty, **data).loss
    np.testing.assert_allclose(loss(2, np.array([2.0, 1.0])), twice, rtol=1e-5)


def test_offset_noise_is_one_draw_an_example_and_channel():

    def keys():
        return example_keys(key_for(0, "offset"), jnp.arange(400))

    noise = jnp.zeros((400, 3, 3, 2))
    moved = offset(Objective(offset_noise=0.2), keys(), noise)
    assert np.all(moved == moved[:, :1, :1])
    assert np.std(moved[:, 0, 0]) == pytest.approx(0.2, rel=0.1)
    assert abs(np.corrcoef(moved[:, 0, 0].T)[0, 1]) < 0.2
    assert offset(Objective(), keys(), noise) is noise


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"parameterisation": "noise"}, "parameterisation 'noise' is unknown"),
        ({"weight": "snr"}, "weight 'snr' is unknown"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma 0.0 must be above 0; 5 is"),
        ({"offset_noise": -0.1}, "offset_noise -0.1 must be at least 0; 0 = none"),
        ({"cosine_weight": float("nan")}, "cosine_weight nan must be at least 0"),
    ],
)
def test_objective_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        Objective(**fields)
