"""Laws of what a denoiser may predict, over every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.parameterisation import (
    PARAMETERISATIONS,
    check,
    clipped,
    dynamically_clipped,
    predictor,
    target,
    x0_and_eps,
)
from ldm_jax.diffusion.process import KINDS, TABLES, ProcessConfig, corrupt, make_process
from ldm_jax.errors import InputError
from ldm_jax.keys import key_for

PROCESSES = {kind: ProcessConfig(kind, sigma_data=0.7) for kind in KINDS} | {
    f"{kind}-zero": ProcessConfig(kind, zero_terminal_snr=True) for kind in TABLES
}


def fitting():
    for label, config in PROCESSES.items():
        process = make_process(config)
        for name in PARAMETERISATIONS:
            try:
                check(process, name)
            except InputError:
                continue
            yield pytest.param(process, name, id=f"{label}-{name}")


def draw(process, ends):
    """(x0, eps, t) in f64; with `ends`, at the very ends of the process."""
    if process.discrete:
        t = jnp.array([0, 999, 0, 999] if ends else [1, 300, 700, 998], jnp.int32)
    else:
        top = process.config.sigma_max if process.config.kind == "edm" else 1.0
        t = jnp.array([0.0, 1.0, 0.0, 1.0] if ends else [1e-3, 0.3, 0.7, 0.999]) * top
    x0 = jax.random.normal(key_for(0, "x0"), (4, 2, 2, 3), float)
    return x0, jax.random.normal(key_for(0, "eps"), x0.shape, float), t


@pytest.mark.parametrize(("process", "name"), list(fitting()))
@pytest.mark.parametrize("ends", [False, True])
def test_target_and_state_give_data_and_noise_back(process, name, ends):
    with jax.enable_x64(True):
        x0, eps, t = draw(process, ends)
        z_t = corrupt(process, x0, eps, t)
        prediction = target(process, name, x0, eps, t)
        assert np.isfinite(prediction).all()
        got_x0, got_eps = x0_and_eps(process, name, z_t, prediction, t)
        np.testing.assert_allclose(got_x0, x0, rtol=0, atol=1e-10)
        if name == "x0" and ends and not process.discrete:
            got_eps, eps = got_eps[1::2], eps[1::2]  # data without noise tells nothing about eps
        np.testing.assert_allclose(got_eps, eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", TABLES)
def test_preconditioned_prediction_is_minus_v_for_data_of_unit_variance(kind):
    process = make_process(ProcessConfig(kind))
    with jax.enable_x64(True):
        x0, eps, t = draw(process, False)
        theirs = -target(process, "v", x0, eps, t)
        np.testing.assert_allclose(
            target(process, "preconditioned", x0, eps, t), theirs, atol=1e-14
        )


def test_preconditioning_is_edm():
    process = make_process(ProcessConfig("edm", sigma_data=0.5))
    with jax.enable_x64(True):
        x0, eps, _ = draw(process, False)
        s = np.array([0.002, 0.1, 3.0, 80.0])
        z_t = corrupt(process, x0, eps, jnp.asarray(s))
        skip, out = 0.25 / (s**2 + 0.25), s * 0.5 / np.sqrt(s**2 + 0.25)
        skip, out = skip.reshape(4, 1, 1, 1), out.reshape(4, 1, 1, 1)
        prediction = target(process, "preconditioned", x0, eps, jnp.asarray(s))
        np.testing.assert_allclose(skip * z_t + out * prediction, x0, rtol=0, atol=1e-12)


def test_velocity_of_the_straight_path_is_noise_minus_data():
    process = make_process(ProcessConfig("flow"))
    x0, eps, t = draw(process, False)
    np.testing.assert_array_equal(target(process, "velocity", x0, eps, t), eps - x0)


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        (ProcessConfig(zero_terminal_snr=True), "eps", "'eps'.*choose 'v' or 'x0'"),
        (ProcessConfig("flow"), "eps", "'eps'.*'flow' ends on noise"),
        (ProcessConfig(), "velocity", "'velocity'.*'ldm_linear'.*choose 'v'"),
        (ProcessConfig(), "noise", "'noise' is unknown.*'eps'"),
    ],
)
def test_prediction_that_does_not_fit_the_process_is_refused(config, name, words):
    with pytest.raises(InputError, match=words):
        predictor(make_process(config), name, lambda z_t, t, cond: z_t)


def test_prediction_that_would_broadcast_is_refused():
    predict = predictor(make_process(ProcessConfig()), "eps", lambda z_t, t, cond: z_t[..., :1])
    with pytest.raises(AssertionError, match=r"\(1, 2, 2, 1\)"):
        predict(jnp.zeros((1, 2, 2, 3)), jnp.zeros(1, jnp.int32), None)


@pytest.mark.parametrize("limit", [clipped, dynamically_clipped])
def test_limited_data_and_its_noise_still_explain_the_state(limit):
    process = make_process(ProcessConfig())
    t = jnp.array([10, 400, 990])
    z_t = 2 * jax.random.normal(key_for(0, "z_t"), (3, 4, 4, 2))
    plain = predictor(process, "eps", lambda z_t, t, cond: 0.3 * z_t)
    limited = limit(plain, process, 0.9)
    x0, eps = limited(z_t, t, None)
    assert np.abs(x0).max() <= 1 and np.abs(plain(z_t, t, None)[0]).max() > 1
    np.testing.assert_allclose(corrupt(process, x0, eps, t), z_t, rtol=0, atol=1e-5)


def test_dynamic_limit_leaves_data_in_range_alone():
    process = make_process(ProcessConfig())
    z_t, t = 0.1 * jax.random.normal(key_for(0, "z_t"), (1, 4, 4, 2)), jnp.array([10])
    plain = predictor(process, "x0", lambda z_t, t, cond: z_t)
    np.testing.assert_array_equal(dynamically_clipped(plain, process)(z_t, t, None)[0], z_t)


def test_dynamic_limit_brings_the_quantile_to_the_bound():
    process = make_process(ProcessConfig())
    z_t, t = 3 * jax.random.normal(key_for(0, "z_t"), (2, 8, 8, 2)), jnp.array([10, 900])
    plain = predictor(process, "x0", lambda z_t, t, cond: z_t)
    x0 = dynamically_clipped(plain, process, 0.8, 2.0)(z_t, t, None)[0].reshape(2, -1)
    np.testing.assert_allclose(np.quantile(np.abs(x0), 0.75, axis=1) < 2, True)
    np.testing.assert_allclose(np.quantile(np.abs(x0), 0.81, axis=1), 2, rtol=1e-6)
    within = np.abs(x0) < 2
    ratio = (x0 / z_t.reshape(2, -1))[0][within[0]]
    assert ratio.std() < 1e-6 and ratio.mean() < 1


@pytest.mark.parametrize(("bound", "scale"), [(0.5, 3), (0.5, 0.25), (1, 3), (2, 3), (2, 0.5)])
def test_dynamic_limit_is_imagens(bound, scale):
    process = make_process(ProcessConfig())
    z_t, t = scale * jax.random.normal(key_for(0, "z_t"), (2, 20, 20, 2)), jnp.array([10, 900])
    plain = predictor(process, "x0", lambda z_t, t, cond: z_t)
    x0 = np.float64(z_t)
    size = np.quantile(np.abs(x0), 0.995, axis=(1, 2, 3), keepdims=True)  # Imagen, section 2.3
    size = np.maximum(size, bound)
    expected = np.clip(x0, -size, size) / size * bound
    got = dynamically_clipped(plain, process, bound=bound)(z_t, t, None)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_limit_cuts_off_what_is_beyond_its_bound_and_nothing_else():
    process = make_process(ProcessConfig())
    z_t, t = 2 * jax.random.normal(key_for(0, "z_t"), (2, 4, 4, 2)), jnp.array([10, 900])
    plain = predictor(process, "x0", lambda z_t, t, cond: z_t)
    got = clipped(plain, process, 0.9)(z_t, t, None)[0]
    np.testing.assert_array_equal(got, np.clip(z_t, np.float32(-0.9), np.float32(0.9)))
