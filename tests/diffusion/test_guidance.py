"""Laws of guidance: what each rule leaves alone, and what it does to the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import guidance
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.parameterisation import predictor
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.diffusion.samplers import ddim
from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, key_for

Z_T = jax.random.normal(key_for(0, "z_T"), (3, 4, 4, 2))
T = jnp.array([10, 500, 990], jnp.int32)
COND = {"label": jnp.array([0, 1, 2], jnp.int32), "shift": jnp.array([[0.3], [0.7], [-1.1]])}
NULL = {"label": 3, "shift": jnp.array([[0.1]])}
TABLE = jnp.array([0.37, -1.3, 2.1, 0.9])


def denoiser(z_t, t, cond):
    rows = (len(z_t), 1, 1, 1)
    gain = TABLE[cond["label"]].reshape(rows) + t.reshape(rows) / 1000
    return jnp.tanh(z_t * gain) + cond["shift"].reshape(rows)


def conditional():
    return denoiser(Z_T, T, COND)


def unconditional():
    null = {"label": jnp.full((3,), 3), "shift": jnp.full((3, 1), 0.1)}
    return denoiser(Z_T, T, null)


def classifier_free(scale, denoiser=denoiser):
    contrast = guidance.null_and_cond(denoiser, NULL)
    return guidance.guide(contrast, guidance.extrapolate(scale))


@pytest.mark.parametrize("scale", [1.0, jnp.float32(1)])
def test_scale_one_is_the_conditional_model_bit_for_bit(scale):
    guided = classifier_free(scale)(Z_T, T, COND)
    np.testing.assert_array_equal(guided, conditional())


def test_scale_zero_is_the_unconditional_model():
    guided = classifier_free(0.0)(Z_T, T, COND)
    np.testing.assert_array_equal(guided, unconditional())


@pytest.mark.parametrize("scale", [-0.5, 0.5, 1.5, 5.0])
def test_prediction_is_linear_in_scale(scale):
    guided = classifier_free(scale)(Z_T, T, COND)
    null, cond = np.float64(unconditional()), np.float64(conditional())
    np.testing.assert_allclose(guided, (1 - scale) * null + scale * cond, rtol=0, atol=2e-6)


def test_both_predictions_come_from_one_call_null_half_first():
    calls = []

    def recorded(z_t, t, cond):
        calls.append((z_t, t, cond))
        return denoiser(z_t, t, cond)

    classifier_free(2.0, recorded)(Z_T, T, COND)
    ((z_t, t, cond),) = calls
    np.testing.assert_array_equal(z_t, np.concatenate([Z_T, Z_T]))
    np.testing.assert_array_equal(t, [10, 500, 990, 10, 500, 990])
    np.testing.assert_array_equal(cond["label"], [3, 3, 3, 0, 1, 2])
    assert cond["label"].dtype == jnp.int32
    np.testing.assert_allclose(cond["shift"][:, 0], [0.1, 0.1, 0.1, 0.3, 0.7, -1.1], rtol=1e-6)


def test_sampling_compiles_once_for_every_scale_and_key():
    traces = []
    process = make_process(ProcessConfig())
    grid = make_grid(process, 5)

    def counted(z_t, t, cond):
        traces.append(z_t.shape)
        return denoiser(z_t, t, cond)

    @jax.jit
    def sample(scale, keys):
        guided = predictor(process, "eps", classifier_free(scale, counted))
        return ddim(guided, grid, Z_T, COND, keys, eta=0.5)

    def keys(seed):
        return example_keys(key_for(seed, "sampler"), jnp.arange(3))

    first = sample(1.0, keys(0))
    others = [sample(4.0, keys(0)), sample(1.0, keys(1)), sample(2.5, keys(2))]
    assert len(traces) == 1
    assert all(jnp.any(jnp.abs(other - first) > 1e-3) for other in others)


SCHEDULE = make_process(ProcessConfig())
CONTRAST = guidance.null_and_cond(denoiser, NULL)


def bad(z_t, t, cond):
    return 0.7 * denoiser(z_t, t, cond) + 0.1 * z_t


def levels(t):
    alpha_bar = jnp.asarray(SCHEDULE.alpha_bar)[t].reshape(-1, 1, 1, 1)
    return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def to_x0(z_t, eps, t):
    alpha, sigma = levels(t)
    return (z_t - sigma * eps) / alpha


def from_x0(z_t, x0, t):
    alpha, sigma = levels(t)
    return (z_t - alpha * x0) / sigma


def rescaled(scale):
    return guidance.rescale(guidance.extrapolate(scale), 0.7)


def some_channels(scale):
    return guidance.channels(guidance.extrapolate(scale), [1])


def projected_in_x0(scale):
    rule = guidance.project(scale, eta=0.3, norm_threshold=2.0)
    return guidance.in_x0(rule, to_x0, from_x0)


RULES = {
    "extrapolate": guidance.extrapolate,
    "rescale": rescaled,
    "project": guidance.project,
    "channels": some_channels,
    "in_x0": projected_in_x0,
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_of_scale_one_is_the_strong_model_bit_for_bit(name):
    guided = guidance.guide(CONTRAST, RULES[name](1.0))(Z_T, T, COND)
    assert np.asarray(guided).tobytes() == np.asarray(conditional()).tobytes()


@pytest.mark.parametrize("name", RULES)
def test_a_scale_for_each_row_is_that_scale_for_that_row(name):
    scales = [0.5, 1.0, 3.0]
    together = guidance.guide(CONTRAST, RULES[name](jnp.array(scales)))(Z_T, T, COND)
    for row, scale in enumerate(scales):
        alone = guidance.guide(CONTRAST, RULES[name](scale))(Z_T, T, COND)
        np.testing.assert_allclose(together[row], alone[row], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(together[1], conditional()[1])
    assert np.abs(together[2] - conditional()[2]).max() > 5e-3


def test_autoguidance_goes_from_the_bad_model_through_the_good_one():
    good = conditional()

    def at(scale):
        contrast = guidance.bad_and_good(bad, denoiser)
        return guidance.guide(contrast, guidance.extrapolate(scale))(Z_T, T, COND)

    np.testing.assert_array_equal(at(1.0), good)
    np.testing.assert_array_equal(at(0.0), bad(Z_T, T, COND))
    away = 1.5 * (np.float64(good) - np.float64(bad(Z_T, T, COND)))
    np.testing.assert_allclose(at(2.5), np.float64(good) + away, rtol=0, atol=2e-6)


@pytest.mark.parametrize("low, high, inside", [(0, 5, ()), (10, 500, (0, 1)), (991, 999, ())])
def test_outside_of_its_interval_guidance_is_the_conditional_model_bit_for_bit(low, high, inside):
    # Powers of two: a compiled product is the same, bit for bit, as one that is not.
    def doubling(z_t, t, c):
        return z_t * 2.0 ** c["label"].reshape(-1, 1, 1, 1)

    contrast, rule = guidance.null_and_cond(doubling, NULL), guidance.extrapolate(3.0)
    got = guidance.interval(contrast, rule, low, high)(Z_T, T, COND)
    full = guidance.guide(contrast, rule)(Z_T, T, COND)
    for row in range(3):
        want = full if row in inside else doubling(Z_T, T, COND)
        assert np.asarray(got[row]).tobytes() == np.asarray(want[row]).tobytes()
        assert np.abs(full - doubling(Z_T, T, COND))[row].max() > 0.1


def test_outside_of_its_interval_the_unconditional_model_does_not_run():
    rows = []

    def counted(z_t, t, cond):
        jax.debug.callback(lambda n: rows.append(int(n)), len(z_t))
        return denoiser(z_t, t, cond)

    contrast = guidance.null_and_cond(counted, NULL)
    run = jax.jit(guidance.interval(contrast, guidance.extrapolate(2.0), 0, 600))
    for t, want in ((990, 3), (500, 6)):
        rows.clear()
        run(Z_T, jnp.full((3,), t, jnp.int32), COND).block_until_ready()
        jax.effects_barrier()
        assert rows == [want]


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_brings_the_spread_towards_the_conditional_one(phi):
    plain = np.float64(guidance.guide(CONTRAST, guidance.extrapolate(4.0))(Z_T, T, COND))
    rule = guidance.rescale(guidance.extrapolate(4.0), phi)
    got = np.float64(guidance.guide(CONTRAST, rule)(Z_T, T, COND))

    def spread(x):
        return x.std(axis=(1, 2, 3))

    want = phi * spread(np.float64(conditional())) + (1 - phi) * spread(plain)
    np.testing.assert_allclose(spread(got), want, rtol=1e-5)
    # One factor a row: nothing but the size changes.
    np.testing.assert_allclose(np.ptp(got / plain, axis=(1, 2, 3)), 0, atol=1e-5)


def test_projection_of_all_of_the_difference_is_classifier_free_guidance():
    got = guidance.guide(CONTRAST, guidance.project(3.0, eta=1.0))(Z_T, T, COND)
    np.testing.assert_allclose(got, classifier_free(3.0)(Z_T, T, COND), atol=2e-6)


def test_projected_guidance_is_orthogonal_and_no_longer_than_allowed():
    strong = np.float64(conditional()).reshape(3, -1)
    rule = guidance.project(2.0, eta=0.0, norm_threshold=0.5)
    got = np.float64(guidance.guide(CONTRAST, rule)(Z_T, T, COND)).reshape(3, -1) - strong
    assert np.linalg.norm(got, axis=1).max() <= 0.5 + 1e-6
    assert np.linalg.norm(got, axis=1).min() > 0.1
    np.testing.assert_allclose((got * strong).sum(1), 0, atol=1e-5)
    along = guidance.guide(CONTRAST, guidance.project(2.0, 1.0, 0.5))(Z_T, T, COND)
    size = np.linalg.norm(np.float64(along).reshape(3, -1) - strong, axis=1)
    np.testing.assert_allclose(size, 0.5, rtol=1e-5)


def test_projection_of_a_zero_prediction_or_a_zero_difference_is_finite():
    zero = jnp.zeros((1, 2, 2, 1))
    rule = guidance.project(2.0, 0.0, 0.5)
    for weak, strong in ((zero, zero), (zero + 1, zero), (zero + 1, zero + 1)):
        assert np.isfinite(rule(weak, strong, zero, jnp.zeros((1,)))).all()


def test_guided_channels_are_guided_and_the_others_are_not_touched():
    plain = guidance.guide(CONTRAST, guidance.extrapolate(3.0))(Z_T, T, COND)
    got = guidance.guide(CONTRAST, some_channels(3.0))(Z_T, T, COND)
    np.testing.assert_array_equal(got[..., 1], plain[..., 1])
    np.testing.assert_array_equal(got[..., 0], conditional()[..., 0])
    assert (np.abs(plain - conditional()) > 1e-3).any(axis=(0, 1, 2)).all()


@pytest.mark.parametrize("which", [[], [2], [0, -1]])
def test_channels_that_the_latent_lacks_are_refused(which):
    with pytest.raises(InputError, match=r"guided channels .* must be among the latent's 0\.\.1"):
        rule = guidance.channels(guidance.extrapolate(2.0), which)
        guidance.guide(CONTRAST, rule)(Z_T, T, COND)


def test_a_rule_in_x0_acts_on_x0():
    rule = guidance.project(3.0, eta=0.0, norm_threshold=2.0)
    got = guidance.guide(CONTRAST, guidance.in_x0(rule, to_x0, from_x0))(Z_T, T, COND)
    weak, strong = to_x0(Z_T, unconditional(), T), to_x0(Z_T, conditional(), T)
    want = rule(weak, strong, Z_T, T)
    size = np.abs(want).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(to_x0(Z_T, got, T) / size, want / size, atol=1e-5)
    # Extrapolation is the same in either.
    linear = guidance.in_x0(guidance.extrapolate(3.0), to_x0, from_x0)
    got = guidance.guide(CONTRAST, linear)(Z_T, T, COND)
    want = guidance.guide(CONTRAST, guidance.extrapolate(3.0))(Z_T, T, COND)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_one_program_serves_every_scale_and_interval():
    traces = []

    def counted(z_t, t, cond):
        traces.append(z_t.shape)
        return denoiser(z_t, t, cond)

    @jax.jit
    def run(scale, phi, low, high, eta, threshold):
        contrast = guidance.null_and_cond(counted, NULL)
        rule = guidance.rescale(guidance.project(scale, eta, threshold), phi)
        return guidance.interval(contrast, rule, low, high)(Z_T, T, COND)

    first = run(2.0, 0.5, 0, 999, 0.3, 4.0)
    count = len(traces)
    others = [
        run(3.0, 0.5, 0, 999, 0.3, 4.0),
        run(2.0, 0.1, 0, 999, 0.3, 4.0),
        run(2.0, 0.5, 100, 999, 0.3, 4.0),
        run(2.0, 0.5, 0, 600, 0.3, 4.0),
        run(2.0, 0.5, 0, 999, 1.0, 4.0),
        run(2.0, 0.5, 0, 999, 0.3, 0.1),
    ]
    assert len(traces) == count == 2
    assert all(jnp.any(jnp.abs(other - first) > 1e-4) for other in others)
