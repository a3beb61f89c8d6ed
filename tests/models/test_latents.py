"""The Gaussian latent: its divergence, its draws, its whitening."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.keys import example_keys, normal_like
from ldm_jax.models import latents
from ldm_jax.models.latents import (
    DRAWS,
    SPREADS,
    Whitening,
    make_codec,
    split_moments,
    standardisation,
    whitening,
)

sample = jax.jit(latents.sample)
kl_to_standard_normal = jax.jit(latents.kl_to_standard_normal)


def moments(mean, logvar):
    return jnp.asarray(np.concatenate([mean, logvar], axis=-1), jnp.float32)


@pytest.fixture(scope="module")
def posterior():
    """Mean and log-variance [3,2,2,4] in f64."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 2, 2, 4)), rng.normal(size=(3, 2, 2, 4))


def keys(n, seed=0):
    return example_keys(jax.random.key(seed), jnp.arange(n))


def test_divergence_of_the_standard_normal_from_itself_is_zero():
    np.testing.assert_array_equal(kl_to_standard_normal(jnp.zeros((2, 4, 4, 6))), np.zeros(2))


def test_divergence_is_the_closed_form_summed_over_the_latent(posterior):
    mean, logvar = posterior
    each = [
        sum(
            0.5 * (m * m + math.exp(v) - 1 - v)
            for m, v in zip(mean[b].ravel(), logvar[b].ravel(), strict=True)
        )
        for b in range(3)
    ]
    np.testing.assert_allclose(kl_to_standard_normal(moments(mean, logvar)), each, rtol=1e-5)


def test_divergence_is_the_mean_log_ratio_of_the_densities_over_draws(posterior):
    mean, logvar = (a[:1] for a in posterior)
    count = 20_000
    many = jnp.broadcast_to(moments(mean, logvar), (count, 2, 2, 8))
    z = np.asarray(sample(many, keys(count)), np.float64)
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar)
    log_ratio = (log_q + 0.5 * z**2).sum((1, 2, 3))
    want = float(kl_to_standard_normal(moments(mean, logvar))[0])
    assert abs(log_ratio.mean() - want) < 5 * log_ratio.std() / math.sqrt(count)


def test_draws_have_the_posterior_mean_and_deviation():
    count = 20_000
    mean, logvar = np.array([1.5, -2.0]), np.log(np.array([0.25, 9.0]))
    row = moments(mean, logvar).reshape(1, 1, 1, 4)
    z = sample(jnp.broadcast_to(row, (count, 1, 1, 4)), keys(count))[:, 0, 0]
    np.testing.assert_allclose(z.mean(0), mean, atol=5 * 3 / math.sqrt(count))
    np.testing.assert_allclose(z.std(0), [0.5, 3.0], rtol=5 / math.sqrt(2 * count))


def test_draw_of_a_row_depends_on_its_key_alone(posterior):
    m = moments(*posterior)
    every = sample(m, keys(3))
    np.testing.assert_allclose(sample(m[1:2], keys(3)[1:2]), every[1:2], atol=1e-6)
    assert not np.any(np.asarray(sample(m, keys(3, seed=1))) == np.asarray(every))


IDENTITY = Whitening((0.0,) * 4, (1.0,) * 4)
GAUSSIAN, POINT = (make_codec("sample", p, IDENTITY) for p in latents.POSTERIORS)


def test_mode_is_the_mean_and_a_draw_without_variance_hits_it(posterior):
    mean, logvar = posterior
    np.testing.assert_array_equal(
        GAUSSIAN.encode_mode(moments(mean, logvar)), mean.astype(np.float32)
    )
    certain = moments(mean, np.full_like(mean, -100.0))
    # The clamp leaves a deviation of exp(-15).
    np.testing.assert_allclose(sample(certain, keys(3)), mean, atol=2e-6)


def test_a_point_is_its_own_draw_and_mode(posterior):
    point = posterior[0].astype(np.float32)
    np.testing.assert_array_equal(POINT.encode(point, keys(3)), point)
    np.testing.assert_array_equal(POINT.encode_mode(point), point)
    gaussian = moments(*posterior)
    drawn = GAUSSIAN.encode(gaussian, keys(3))
    np.testing.assert_allclose(drawn, sample(gaussian, keys(3)), atol=1e-6)


WHITE = Whitening((0.5, -1.0, 0.0, 2.0), (2.0, 3.0, 0.5, 1.0))
SECOND = Whitening((-9.0, 0.1, 1.0, 0.0), (0.5, 1.0, 2.0, 3.0), (-40.0,) * 4, (40.0,) * 4)
BOTH = WHITE.beside(SECOND)


@pytest.mark.parametrize("kind", DRAWS)
def test_codecs_of_one_half_whiten_what_they_hold_and_give_it_back(posterior, kind):
    point, m = jnp.asarray(posterior[0], jnp.float32), moments(*posterior)
    held = point if kind == "mean" else sample(m, keys(3))
    for of, given, want in (("point", point, point), ("gaussian", m, held)):
        codec = make_codec(kind, of, WHITE)
        z = codec.encode(given, keys(3))
        assert z.shape[-1] == codec.channels == 4 and codec.halves == (4, 0)
        np.testing.assert_allclose(z, WHITE.whiten(want), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(codec.decode(z), want, atol=1e-5)
        mode = codec.decode(codec.encode_mode(given))
        np.testing.assert_allclose(mode, point, atol=1e-5)


@pytest.mark.parametrize("kind", SPREADS)
def test_codecs_of_two_halves_hold_the_mean_beside_the_spread_and_draw_by_it(posterior, kind):
    m, codec = moments(*posterior), make_codec(kind, "gaussian", BOTH)
    z = codec.encode(m, keys(3))
    assert z.shape[-1] == codec.channels == 8 and codec.halves == (4, 4)
    assert codec.draws == "none"
    np.testing.assert_array_equal(z, codec.encode_mode(m))
    np.testing.assert_array_equal(z[..., :4], make_codec("mean", "gaussian", WHITE).encode_mode(m))
    np.testing.assert_allclose(codec.decode(z), posterior[0], atol=1e-5)
    spread = SECOND.unwhiten(z[..., 4:])
    np.testing.assert_allclose(codec.spread.std(spread), np.exp(posterior[1] / 2), rtol=1e-4)
    drawn = codec.decode(z, keys(3))
    np.testing.assert_allclose(drawn, sample(m, keys(3)), atol=1e-3)


@pytest.mark.parametrize("kind", SPREADS)
def test_a_draw_by_the_second_half_stays_within_what_was_seen(posterior, kind):
    spread = SPREADS[kind]
    low, high = (np.asarray(spread.of(jnp.log(jnp.float32(v)))) for v in (0.25, 4.0))
    bounded = dataclasses.replace(BOTH, low=(float(low),) * 4, high=(float(high),) * 4)
    codec = make_codec(kind, "gaussian", bounded)
    for said, std in ((-1e6, 0.5), (1e6, 2.0)):
        z = jnp.full((3, 2, 2, 8), said).at[..., :4].set(0.0)
        off = codec.decode(z, keys(3)) - codec.decode(z)
        np.testing.assert_allclose(off, std * normal_like(keys(3), off), rtol=1e-3, atol=1e-5)


def test_mean_is_a_sample_without_variance_to_the_bit():
    # The clamp leaves a deviation of exp(-15), which is less than half a unit in the last place.
    mean = 64.0 + np.random.default_rng(0).normal(size=(3, 2, 2, 4)) * 3
    m = moments(mean, np.full_like(mean, -np.inf))
    drawn, held = (make_codec(k, "gaussian", WHITE).encode(m, keys(3)) for k in ("sample", "mean"))
    np.testing.assert_array_equal(drawn, held)
    spread = moments(mean, np.zeros_like(mean))
    np.testing.assert_array_equal(
        make_codec("mean", "gaussian", WHITE).encode(spread, keys(3)), held
    )


def test_a_frozen_sample_is_a_sample_and_only_its_draws_are_others(posterior):
    m = moments(*posterior)
    each = [make_codec(k, "gaussian", WHITE) for k in ("sample", "sample_frozen")]
    assert [codec.draws for codec in each] == ["step", "example"]
    a, b = (codec.encode(m, keys(3)) for codec in each)
    np.testing.assert_array_equal(a, b)


def test_second_halves_are_standardised_but_for_channels_that_hardly_vary():
    w = standardisation((-9.0, 1.0, 2.0), (2.0, 0.0, 0.3), 8.0, (-14.0,) * 3, (-3.0,) * 3)
    assert w == Whitening((-9.0, 1.0, 2.0), (2.0, 0.4, 0.4), (-14.0,) * 3, (-3.0,) * 3)
    with pytest.raises(InputError, match=r"deviation of 0\.0 .*use --config\.codec=mean"):
        standardisation((1.0,), (0.0,), 0.0, (1.0,), (1.0,))


def test_an_unknown_codec_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"codec 'fsq' is unknown; choose one of .*'sample'"):
        make_codec("fsq", "point", IDENTITY)


@pytest.mark.parametrize("kind", SPREADS)
def test_the_spread_of_a_point_is_refused(kind):
    with pytest.raises(InputError, match=rf"codec '{kind}' .* points .*use --config\.codec=mean"):
        make_codec(kind, "point", BOTH)


def test_log_variance_is_clamped_to_the_published_range():
    mean, logvar = split_moments(jnp.array([[7.0, 8.0, 9.0, -1e9, 1e9, 3.0]]))
    np.testing.assert_array_equal(mean, [[7.0, 8.0, 9.0]])
    np.testing.assert_array_equal(logvar, [[-30.0, 20.0, 3.0]])
    extreme = jnp.full((1, 1, 1, 2), 1e9).at[..., 0].set(0.0)
    want = 0.5 * (math.exp(20) - 1 - 20)
    np.testing.assert_allclose(kl_to_standard_normal(extreme), [want], rtol=1e-6)


STATISTICS = ((0.5, -2.0, 3.0), (2.0, 0.25, 5.0), 3.5)


@pytest.mark.parametrize("kind", ["global", "channel", "none"])
def test_unwhitening_inverts_whitening(kind):
    w = whitening(kind, *STATISTICS)
    z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)) * 3, jnp.float32)
    np.testing.assert_allclose(w.unwhiten(w.whiten(z)), z, atol=1e-5)
    np.testing.assert_allclose(w.whiten(w.unwhiten(z)), z, atol=1e-5)


def measured():
    mean, std = (np.array(s) for s in STATISTICS[:2])
    z = np.random.default_rng(0).normal(size=(64, 8, 8, 3)) * std + mean
    # Exactly of these statistics, as a cache has measured them.
    return z, tuple(z.mean((0, 1, 2)).tolist()), tuple(z.std((0, 1, 2)).tolist()), float(z.std())


def test_channel_whitening_gives_every_channel_zero_mean_and_unit_variance():
    z, *statistics = measured()
    white = np.asarray(whitening("channel", *statistics).whiten(jnp.asarray(z, jnp.float32)))
    np.testing.assert_allclose(white.mean((0, 1, 2)), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(white.std((0, 1, 2)), np.ones(3), atol=1e-5)


def test_global_whitening_divides_by_one_number_and_shifts_nothing():
    z, *statistics = measured()
    white = np.asarray(whitening("global", *statistics).whiten(jnp.asarray(z, jnp.float32)))
    np.testing.assert_allclose(white, z / z.std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(white.std(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(white.mean((0, 1, 2)), np.array(statistics[0]) / z.std(), rtol=1e-4)


def test_no_whitening_is_the_identity():
    z = jnp.asarray(measured()[0], jnp.float32)
    np.testing.assert_array_equal(whitening("none", *STATISTICS).whiten(z), z)


def test_whitening_is_per_channel_of_the_last_axis():
    w = Whitening((1.0, 2.0), (2.0, 4.0))
    np.testing.assert_array_equal(w.whiten(jnp.array([[3.0, 10.0]])), [[1.0, 2.0]])
    np.testing.assert_array_equal(w.unwhiten(jnp.array([1.0, 2.0])), [3.0, 10.0])


def test_unknown_whitening_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"whitening 'pca' is unknown; choose one of .*'channel'"):
        whitening("pca", *STATISTICS)


def test_fixed_factors_are_those_of_published_models():
    z = np.random.default_rng(2).normal(size=(2, 3, 3, 3)).astype(np.float32)

    def fixed(*factors):
        return whitening("fixed", *STATISTICS, *factors)

    np.testing.assert_allclose(fixed((0.18215,)).whiten(z), 0.18215 * z, rtol=1e-6)
    w = fixed((0.5, 2.0, 3.0), (1.0, 0.0, -1.0))
    np.testing.assert_allclose(w.whiten(z), (z - [1, 0, -1]) * [0.5, 2, 3], rtol=1e-5, atol=1e-6)
    for factors in ((), ((0.0,),), ((1.0, 2.0),), ((1.0,), (0.0, 0.0))):
        with pytest.raises(InputError, match="scale_factor of one or 3"):
            fixed(*factors)
    with pytest.raises(InputError, match="belong to the whitening"):
        whitening("global", *STATISTICS, (0.18215,))
