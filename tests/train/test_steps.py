"""Losses and steps against numpy, with a model small enough to do by hand in the place of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.diffusion.noise_levels import uniform_timesteps
from ldm_jax.diffusion.process import ProcessConfig, make_process
from ldm_jax.errors import InputError
from ldm_jax.models import latents
from ldm_jax.sharding import MeshConfig, constrain, make_mesh, put_batch
from ldm_jax.train import ema, optim, steps
from ldm_jax.train.state import init_state
from tests import tiny

PROCESS = make_process(ProcessConfig())
MOMENTS = np.random.default_rng(0).normal(size=(4, 2, 2, 4)).astype(np.float32)


draw = jax.jit(steps.denoiser_draws, static_argnums=(4, 5))


def times(keys):
    return uniform_timesteps(keys, 1000)


def draws(step=0, seed=0, rows=slice(None)):
    positions, channels = np.arange(4)[rows], MOMENTS.shape[-1] // 2
    return draw(np.uint32(seed), np.int32(step), MOMENTS[rows], positions, channels, times)


def test_every_draw_has_a_key_of_its_own(monkeypatch):
    """One key for the posterior draw and the noise would correlate them: z would tell the noise."""
    asked = []
    key_for = steps.key_for
    monkeypatch.setattr(steps, "key_for", lambda *a: asked.append(a[1]) or key_for(*a))
    d = jax.jit(
        lambda m: steps.denoiser_draws(0, 0, m, jnp.arange(4), MOMENTS.shape[-1] // 2, times)
    )(MOMENTS)
    assert len(asked) == 4 == len(set(asked))
    mean, logvar = latents.split_moments(jnp.asarray(MOMENTS))
    posterior = (d["z"] - mean) / jnp.exp(logvar / 2)
    assert not np.isclose(posterior, d["noise"], atol=1e-3).any()


def test_draws_of_a_row_depend_on_its_position_the_step_and_the_seed_alone():
    whole = draws()
    for rows in (slice(0, 2), slice(1, 4, 2)):
        for name, value in draws(rows=rows).items():
            np.testing.assert_allclose(value, whole[name][rows], atol=1e-6, err_msg=name)
    for other in (draws(step=1), draws(seed=1)):
        for name, value in other.items():
            assert np.all(np.asarray(value) != np.asarray(whole[name])), name
    for name in ("z", "noise", "uniform"):
        assert len(np.unique(whole[name])) == np.size(whole[name]), name


def test_draws_have_their_laws():
    many = jnp.zeros((4000, 1, 1, 4)).at[..., :2].set(3.0)
    few = lambda keys: uniform_timesteps(keys, 10)  # noqa: E731
    d = jax.jit(lambda m: steps.denoiser_draws(0, 5, m, jnp.arange(4000), 2, few))(many)
    np.testing.assert_allclose(d["z"].mean(), 3.0, atol=5 / 8000**0.5)
    np.testing.assert_allclose(d["noise"].std(), 1.0, atol=5 / 16000**0.5)
    counts = np.bincount(d["t"], minlength=10)
    assert d["t"].dtype == jnp.int32 and len(counts) == 10
    np.testing.assert_allclose(counts, 400, atol=5 * 360**0.5)
    for share in (0.1, 0.5):
        np.testing.assert_allclose(
            (d["uniform"] < share).mean(), share, atol=5 * (share * (1 - share) / 4000) ** 0.5
        )
    assert abs(np.corrcoef(d["uniform"], d["t"])[0, 1]) < 5 / 4000**0.5


@pytest.fixture
def denoiser_loss(monkeypatch):
    """Makes the loss with 0.5 z_t in the denoiser's place; it also returns what that was told."""
    told = []

    def apply(config, params, z_t, t, cond):
        told.append((z_t, t, cond["label"]))
        return params * z_t

    monkeypatch.setattr(steps.denoiser, "apply", apply)
    whitening = latents.Whitening((0.5, -1.0), (2.0, 3.0))

    def make(loss, bins=0):
        losses = steps.denoiser_losses(tiny.DENOISER.model, loss, PROCESS, whitening, 0)
        compute = steps.denoiser_loss(losses, bins)
        run = lambda batch, step: (compute(jnp.float32(0.5), batch, step), told[-1])  # noqa: E731
        run = jax.jit(run)
        return lambda labels, moments, step=0: jax.device_get(
            run({"moments": moments, "label": np.asarray(labels, np.int32)}, np.int32(step))
        )

    return make


@pytest.mark.parametrize(("kind", "penalty"), [("l2", np.square), ("l1", np.abs)])
def test_denoiser_loss_is_the_mean_error_of_the_noise_of_whitened_latents(
    denoiser_loss, kind, penalty
):
    (value, parts), told = denoiser_loss(steps.DenoiserLoss(kind, 0.0))([1, 2, 3, 4], MOMENTS)
    d = {k: np.asarray(v, np.float64) for k, v in draws().items()}
    z0 = (d["z"] - [0.5, -1.0]) / [2.0, 3.0]
    alpha_bar = PROCESS.alpha_bar[d["t"].astype(int)].reshape(4, 1, 1, 1)
    z_t = np.sqrt(alpha_bar) * z0 + np.sqrt(1 - alpha_bar) * d["noise"]
    np.testing.assert_allclose(value, penalty(0.5 * z_t - d["noise"]).mean(), rtol=1e-5)
    assert parts == {}
    np.testing.assert_allclose(told[0], z_t, atol=1e-5)
    np.testing.assert_array_equal(told[1], d["t"])
    np.testing.assert_array_equal(told[2], [1, 2, 3, 4])


def test_losses_by_time_are_sums_and_counts_that_make_up_the_loss(denoiser_loss):
    loss = denoiser_loss(steps.DenoiserLoss("l2", 0.0), bins=8)
    (value, parts), told = loss([1, 2, 3, 4], MOMENTS)
    counts = [parts[f"loss_bin/{k}/count"] for k in range(8)]
    np.testing.assert_array_equal(counts, np.bincount(told[1] * 8 // 1000, minlength=8))
    assert 0 in counts
    sums = np.array([parts[f"loss_bin/{k}/sum"] for k in range(8)])
    assert np.isfinite(sums).all() and not sums[np.array(counts) == 0].any()
    np.testing.assert_allclose(sums.sum(), 4 * value, rtol=1e-6)


def test_ends_of_time_lie_in_the_first_and_the_last_interval():
    np.testing.assert_array_equal(
        steps.bin_of(np.float32([0, 0.24, 0.25, 0.999, 1]), 4), [0, 0, 1, 3, 3]
    )


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_labels_are_dropped_with_the_configured_probability_anew_at_each_step(denoiser_loss, share):
    count, null = 4000, 10
    loss = denoiser_loss(steps.DenoiserLoss("l2", share))
    labels, moments = np.arange(count) % 10, np.zeros((count, 1, 1, 4), np.float32)
    dropped = []
    for step in (0, 1, 0):
        told = loss(labels, moments, step)[1][2]
        dropped.append(told == null)
        np.testing.assert_array_equal(told[~dropped[-1]], labels[~dropped[-1]])
        tolerance = 5 * np.sqrt(share * (1 - share) / count)
        np.testing.assert_allclose(dropped[-1].mean(), share, atol=tolerance)
    np.testing.assert_array_equal(dropped[0], dropped[2])
    if share:
        both = (dropped[0] & dropped[1]).mean()
        np.testing.assert_allclose(both, share**2, atol=5 * share / np.sqrt(count))


def test_losses_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match=r"loss 'l3' is unknown; choose one of \['l1', 'l2'\]"):
        steps.DenoiserLoss("l3")
    for share in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"condition_dropout {share} must be in \[0, 1\)"):
            steps.DenoiserLoss(condition_dropout=share)


OPTIM = optim.OptimConfig(lr=0.1, warmup_steps=4, clip_norm=1.0)
EMA = ema.EmaConfig(decay=0.6)
START = np.arange(1.0, 9.0, dtype=np.float32)


def quadratic(params, batch, step):
    """Its gradient, worked out by hand, is (mean(x) + step) * w."""
    weight = batch["x"].mean() + step.astype(jnp.float32)
    return 0.5 * weight * jnp.square(params["w"]).sum(), {"seen": batch["x"].max()}


def built(average=EMA, config=MeshConfig(2, 4, 1)):
    mesh = make_mesh(config)
    optimizer = optim.make_optimizer(OPTIM, 10)
    state, shardings = init_state(
        lambda: {"w": jnp.asarray(START)},
        {"w": ("in_channels",)},
        optimizer,
        mesh,
        with_ema=bool(average.decay),
    )
    rate = optim.learning_rate(OPTIM, 10)
    step = steps.make_step(quadratic, optimizer, rate, average, mesh, shardings)
    return state, step, mesh


BATCHES = [np.random.default_rng(i).uniform(1, 2, 8).astype(np.float32) for i in range(4)]


@pytest.fixture(scope="module")
def trained():
    """Four steps: the states after each (host copies), the metrics, and the first state."""
    state, step, mesh = built()
    first, history = state, []
    for x in BATCHES:
        state, metrics = step(state, put_batch({"x": x}, mesh, 8))
        history.append(jax.device_get((state, metrics)))
    return first, history, state


def reference():
    """The same by optax on one device, and the average by its definition in f64."""
    optimizer = optim.make_optimizer(OPTIM, 10)
    w = jnp.asarray(START)
    state, average, out = optimizer.init(w), START.astype(np.float64), []
    for n, x in enumerate(BATCHES):
        grads = (x.mean() + n) * w
        updates, state = optimizer.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        decay = min(0.6, (1 + (n + 1)) / (10 + (n + 1)))
        average = decay * average + (1 - decay) * np.asarray(w, np.float64)
        out.append((np.asarray(w), average, np.linalg.norm(grads)))
    return out


def test_step_updates_parameters_average_and_count(trained):
    _, history, _ = trained
    for n, ((state, metrics), (w, average, norm)) in enumerate(
        zip(history, reference(), strict=True)
    ):
        assert state.step == n + 1
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        # Update n + 1 is the average's n + 1: counted from 0 its decays would be 1/10, 2/11, ...
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_metrics_are_of_the_step_that_was_taken(trained):
    _, history, _ = trained
    w = START
    for n, (x, (state, metrics)) in enumerate(zip(BATCHES, history, strict=True)):
        loss = 0.5 * (x.mean() + n) * np.square(w.astype(np.float64)).sum()
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["seen"], x.max())
        np.testing.assert_allclose(metrics["lr"], 0.1 * min(n + 1, 4) / 4, rtol=1e-6)
        w = state.params["w"]


def test_state_is_donated_and_stays_sharded(trained):
    first, _, last = trained
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    for leaf in (last.params["w"], last.ema["w"]):
        assert {s.data.shape for s in leaf.addressable_shards} == {(2,)}


def test_without_an_average_none_is_made():
    state, step, mesh = built(ema.EmaConfig(decay=0.0), MeshConfig(8, 1, 1))
    state, _ = step(state, put_batch({"x": BATCHES[0]}, mesh, 8))
    assert state.ema == {}
    np.testing.assert_allclose(state.params["w"], reference()[0][0], rtol=1e-5)


def test_step_speaks_of_its_mesh_to_the_model():
    """`constrain` inside the loss must find the mesh, or activations stay where they fall."""
    state, _, mesh = built()

    def loss(params, batch, step):
        pinned = constrain(batch["x"] * 2, "batch")
        return (pinned.sum() * jnp.square(params["w"])).sum(), {}

    shardings = jax.tree.map(lambda x: x.sharding, state)
    optimizer = optim.make_optimizer(OPTIM, 10)
    step = steps.make_step(loss, optimizer, lambda n: 0.1, EMA, mesh, shardings)
    text = step.lower(state, put_batch({"x": BATCHES[0]}, mesh, 8)).as_text()
    assert "sharding_constraint" in text or "@Sharding" in text
