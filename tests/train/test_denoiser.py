"""A denoiser's draws and losses against numpy, with a model done by hand in the place of ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import objective
from ldm_jax.diffusion.objective import Denoised, Objective
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.models import latents
from ldm_jax.models.latents import PlainCodec, Whitening
from ldm_jax.train import denoiser, step
from ldm_jax.train.denoiser import DenoiserLoss, Denoising, bin_of, per_example, training_loss
from ldm_jax.train.step import POSITION
from tests import tiny

PROCESS = make_process(ProcessConfig())
MOMENTS = np.random.default_rng(0).normal(size=(4, 2, 2, 4)).astype(np.float32)
PLAIN = PlainCodec("gaussian", Whitening((0.0, 0.0), (1.0, 1.0)))
DENOISING = Denoising(tiny.DENOISER.model, PROCESS, Objective(), PLAIN, DenoiserLoss("l2", 0.5), 0)


def drawn(of, batch, step):
    """All that a step draws, before any network has it: z0, t, noise and the labels."""
    seen = {}

    def record(network, process, objective, *, z0, noise, t, cond, **rest):
        seen.update(z=z0, t=t, noise=noise, label=cond["label"])
        return Denoised(jnp.zeros(len(z0)), z0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "denoising_loss", record)
        per_example(of)({}, {}, batch, step)
    return seen


@jax.jit
def draw(seed, step, moments, rows):
    batch = {"moments": moments, "label": jnp.zeros(len(rows), jnp.int32), POSITION: rows}
    return drawn(dataclasses.replace(DENOISING, seed=seed), batch, step)


def draws(number=0, seed=0, moments=MOMENTS, rows=slice(None)):
    rows = np.arange(len(moments))[rows]
    d = dict(draw(np.uint32(seed), np.int32(number), moments[rows], rows))
    return d | {"dropped": d.pop("label") == 10}


def test_every_draw_has_a_key_of_its_own(monkeypatch):
    """One key for the posterior draw and the noise would correlate them: z would tell the noise."""
    purposes = []
    key_for = step.key_for
    monkeypatch.setattr(step, "key_for", lambda *a: purposes.append(a[1]) or key_for(*a))
    batch = {"moments": MOMENTS, "label": jnp.zeros(4, jnp.int32)}
    d = jax.jit(lambda batch: drawn(DENOISING, batch, 0))(batch)
    assert len(purposes) == 4 == len(set(purposes))
    mean, logvar = latents.split_moments(jnp.asarray(MOMENTS))
    posterior = (d["z"] - mean) / jnp.exp(logvar / 2)
    assert not np.isclose(posterior, d["noise"], atol=1e-3).any()


def test_draws_of_a_row_depend_on_its_position_the_step_and_the_seed_alone():
    whole = draws()
    for rows in (slice(0, 2), slice(1, 4, 2)):
        for name, value in draws(rows=rows).items():
            np.testing.assert_allclose(value, whole[name][rows], atol=1e-6, err_msg=name)
    for other in (draws(number=1), draws(seed=1)):
        for name in ("z", "noise", "t"):
            assert np.all(np.asarray(other[name]) != np.asarray(whole[name])), name
    for name in ("z", "noise"):
        assert len(np.unique(whole[name])) == np.size(whole[name]), name


def test_a_frozen_draw_is_of_the_example_and_the_seed_alone():
    frozen = dataclasses.replace(DENOISING, codec=dataclasses.replace(PLAIN, draws="example"))

    @jax.jit
    def draw(seed, step, index, rows):
        of, moments = dataclasses.replace(frozen, seed=seed), MOMENTS[: len(index)]
        batch = {"moments": moments, "label": index, denoiser.INDEX: index, POSITION: rows}
        return drawn(of, batch, step)

    rows, index = np.arange(4), np.array([7, 2, 9, 2])
    d = draw(0, 0, index, rows)
    later = draw(0, 5, index, rows + 8)  # of another step, in another place
    np.testing.assert_array_equal(later["z"], d["z"])
    assert np.all(np.asarray(later["noise"]) != np.asarray(d["noise"]))
    noise = (d["z"] - MOMENTS[..., :2]) / np.exp(MOMENTS[..., 2:] / 2)
    np.testing.assert_allclose(noise[1], noise[3], atol=1e-5)
    assert not np.isclose(noise[0], noise[1], atol=1e-3).any()
    for other in (draw(1, 0, index, rows), draw(0, 0, index + 1, rows)):
        assert np.all(np.asarray(other["z"]) != np.asarray(d["z"]))


def test_draws_have_their_laws():
    d = draws(moments=np.broadcast_to(np.float32([1, -2, 0, np.log(9)]), (4000, 1, 1, 4)))
    z = d["z"][:, 0, 0]
    np.testing.assert_allclose(z.mean(0), [1, -2], atol=5 * 3 / 4000**0.5)
    np.testing.assert_allclose(z.std(0), [1, 3], rtol=5 / 8000**0.5)
    np.testing.assert_allclose(d["noise"].mean(), 0.0, atol=5 / 8000**0.5)
    np.testing.assert_allclose(d["noise"].std(), 1.0, atol=5 / 16000**0.5)
    counts = np.bincount(d["t"] // 100, minlength=10)
    assert d["t"].dtype == jnp.int32 and len(counts) == 10
    np.testing.assert_allclose(counts, 400, atol=5 * 360**0.5)
    assert 0 <= d["t"].min() < 5 and 995 <= d["t"].max() < 1000
    np.testing.assert_allclose(d["dropped"].mean(), 0.5, atol=5 * (0.25 / 4000) ** 0.5)
    assert abs(np.corrcoef(d["dropped"], d["t"])[0, 1]) < 5 / 4000**0.5
    # Of other steps and seeds, and of neighbours, other rows are dropped.
    for other in (draws(number=1, moments=TALL), draws(seed=1, moments=TALL)):
        assert abs(np.corrcoef(d["dropped"], other["dropped"])[0, 1]) < 5 / 4000**0.5
    assert abs(np.corrcoef(d["dropped"][1:], d["dropped"][:-1])[0, 1]) < 5 / 3999**0.5


TALL = np.zeros((4000, 1, 1, 4), np.float32)


@pytest.fixture
def loss_of(monkeypatch):
    """Makes the loss with 0.5 z_t in the denoiser's place; it also returns what that was given."""
    calls = []

    def apply(config, params, z_t, t, cond):
        calls.append((z_t, t, cond["label"]))
        return params * z_t

    monkeypatch.setattr(denoiser.denoiser, "apply", apply)
    codec = PlainCodec("gaussian", Whitening((0.5, -1.0), (2.0, 3.0)))

    def make(loss, bins=0):
        of = dataclasses.replace(DENOISING, codec=codec, loss=loss)
        compute = training_loss(per_example(of), bins)

        @jax.jit
        def run(batch, number):
            value, seen = compute(jnp.float32(0.5), {}, {}, batch, number)
            return (value, seen.metrics), calls[-1]

        return lambda labels, moments, number=0: jax.device_get(
            run({"moments": moments, "label": np.asarray(labels, np.int32)}, np.int32(number))
        )

    return make


@pytest.mark.parametrize(("kind", "penalty"), [("l2", np.square), ("l1", np.abs)])
def test_denoiser_loss_is_the_mean_error_of_the_noise_of_whitened_latents(loss_of, kind, penalty):
    (value, metrics), call = loss_of(DenoiserLoss(kind, 0.0))([1, 2, 3, 4], MOMENTS)
    d = {k: np.asarray(v, np.float64) for k, v in draws().items()}
    z0 = (d["z"] - [0.5, -1.0]) / [2.0, 3.0]
    alpha_bar = PROCESS.alpha_bar[d["t"].astype(int)].reshape(4, 1, 1, 1)
    z_t = np.sqrt(alpha_bar) * z0 + np.sqrt(1 - alpha_bar) * d["noise"]
    np.testing.assert_allclose(value, penalty(0.5 * z_t - d["noise"]).mean(), rtol=1e-5)
    assert metrics == {}
    np.testing.assert_allclose(call[0], z_t, atol=1e-5)
    np.testing.assert_array_equal(call[1], d["t"])
    np.testing.assert_array_equal(call[2], [1, 2, 3, 4])


def test_losses_by_time_are_sums_and_counts_that_make_up_the_loss(loss_of):
    (value, metrics), call = loss_of(DenoiserLoss("l2", 0.0), bins=8)([1, 2, 3, 4], MOMENTS)
    counts = [metrics[f"loss_bin/{k}/count"] for k in range(8)]
    np.testing.assert_array_equal(counts, np.bincount(call[1] * 8 // 1000, minlength=8))
    assert 0 in counts
    sums = np.array([metrics[f"loss_bin/{k}/sum"] for k in range(8)])
    assert np.isfinite(sums).all() and not sums[np.array(counts) == 0].any()
    np.testing.assert_allclose(sums.sum(), 4 * value, rtol=1e-6)


def test_ends_of_time_lie_in_the_first_and_the_last_interval():
    np.testing.assert_array_equal(bin_of(np.float32([0, 0.24, 0.25, 0.999, 1]), 4), [0, 0, 1, 3, 3])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_labels_are_dropped_with_the_configured_probability_anew_at_each_step(loss_of, share):
    count, null = 4000, 10
    loss = loss_of(DenoiserLoss("l2", share))
    labels = np.arange(count) % 10
    dropped = []
    for number in (0, 1, 0):
        seen = loss(labels, TALL, number)[1][2]
        dropped.append(seen == null)
        np.testing.assert_array_equal(seen[~dropped[-1]], labels[~dropped[-1]])
        tolerance = 5 * np.sqrt(share * (1 - share) / count)
        np.testing.assert_allclose(dropped[-1].mean(), share, atol=tolerance)
    np.testing.assert_array_equal(dropped[0], dropped[2])
    if share:
        both = (dropped[0] & dropped[1]).mean()
        np.testing.assert_allclose(both, share**2, atol=5 * share / np.sqrt(count))


def test_second_half_weighs_what_it_is_given():
    for halves, weight in (((3, 0), 0.5), ((2, 2), 1.0)):
        assert DenoiserLoss(second_half_weight=weight).channel_weights(halves) is None
    weights = DenoiserLoss(second_half_weight=0.25).channel_weights((1, 2))
    np.testing.assert_array_equal(weights, [1, 0.25, 0.25])


def test_second_half_of_no_weight_leaves_the_loss_of_the_first(monkeypatch):
    monkeypatch.setattr(denoiser.denoiser, "apply", lambda config, params, z_t, *_: 0.5 * z_t)
    white = Whitening((0.0,) * 4, (1.0,) * 4, (-9.0,) * 2, (9.0,) * 2)
    concat = latents.make_codec("mean_logvar", "gaussian", white)
    batch = {"moments": MOMENTS, "label": np.zeros(4, np.int32)}

    def losses(weight):
        of = dataclasses.replace(
            DENOISING, codec=concat, loss=DenoiserLoss(second_half_weight=weight)
        )
        return jax.jit(lambda batch: per_example(of)({}, {}, batch, 0)[:4])(batch)

    none, some, all_ = (losses(w) for w in (0.0, 0.5, 1.0))
    keys = step.draw_keys(0, "noise", 0, jnp.arange(4))
    noise = np.asarray(jax.vmap(lambda k: jax.random.normal(k, (2, 2, 4)))(keys))
    t = np.round(np.asarray(none[1]) * 1000).astype(int)
    alpha, sigma = (x[t].reshape(4, 1, 1, 1) for x in (PROCESS.alpha, PROCESS.sigma))
    error = (0.5 * (alpha * MOMENTS + sigma * noise) - noise) ** 2
    first, second = error[..., :2].mean((1, 2, 3)), error[..., 2:].mean((1, 2, 3))
    np.testing.assert_allclose(none[0], first, rtol=1e-4)
    np.testing.assert_allclose(some[0], (first + 0.5 * second) / 1.5, rtol=1e-4)
    np.testing.assert_allclose(all_[0], (first + second) / 2, rtol=1e-4)


def test_losses_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"loss 'l3' is unknown; choose one of \['l1', 'l2'\]"):
        DenoiserLoss("l3")
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"condition_dropout {share} must be in \[0, 1\)"):
            DenoiserLoss(condition_dropout=share)
    with pytest.raises(InputError, match=r"second_half_weight -0\.5 must be at least 0"):
        DenoiserLoss(second_half_weight=-0.5)
