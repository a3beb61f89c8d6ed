"""The step: updates and averages, what follows them, batches taken in parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import (
    MeshConfig,
    check_batch,
    constrain,
    make_mesh,
    put_batch,
    use_mesh,
)
from ldm_jax.train import adversarial, ema, optim
from ldm_jax.train.step import (
    Seen,
    Training,
    Turn,
    draw_keys,
    make_trainer,
    micro_batches,
    positions,
)
from tests import tiny

ALONE = MeshConfig(1, 1, 1), 1
MESHES = {"1 device": ALONE, "2x4": (MeshConfig(2, 4, 1), 8)}


def mesh_of(config, count=8):
    return make_mesh(config, jax.devices()[:count])


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


OPTIM = optim.OptimConfig(lr=0.1, warmup_steps=4, clip_norm=1.0)
EMA = ema.EmaConfig(decay=0.6)
START = np.arange(1.0, 9.0, dtype=np.float32)


def quadratic(trained, extra, frozen, batch, step):
    """Its gradient, worked out by hand, is (mean(x) + step) * w."""
    x = constrain(batch["x"], "batch")
    weight = x.mean() + step.astype(jnp.float32)
    value = 0.5 * weight * jnp.square(trained["w"]).sum()
    return value, Seen({"seen": x.max()}, {"x": x})


QUADRATIC = Training(
    init=lambda key: {"w": jnp.asarray(START)},
    axes={"w": ("in_channels",)},
    loss=quadratic,
    optimizer=optim.make_optimizer(OPTIM, 10),
    learning_rate=optim.learning_rate(OPTIM, 10),
    average=EMA,
    batch={"x": leaf(8)},
)
BATCHES = [np.random.default_rng(i).uniform(1, 2, 8).astype(np.float32) for i in range(4)]


@pytest.fixture(scope="module")
def trained():
    """Four steps: the states after each (host copies), the metrics, and the first state."""
    mesh = mesh_of(MeshConfig(2, 4, 1))
    trainer = make_trainer(QUADRATIC, mesh)
    first = state = trainer.init()
    history = []
    for x in BATCHES:
        state, metrics = trainer.step(state, {}, put_batch({"x": x}, mesh, 8))
        history.append(jax.device_get((state, metrics)))
    return first, history, state, trainer


# The published warm-up of averages, (1 + n) / (10 + n), is past the decay 0.6 from n = 13 on.
DECAYS = [2 / 11, 3 / 12, 4 / 13, 5 / 14]


def reference():
    """The same by optax on one device, and the average by its definition in f64."""
    optimizer = optim.make_optimizer(OPTIM, 10)
    w = jnp.asarray(START)
    state, average, out = optimizer.init(w), START.astype(np.float64), []
    for n, (x, decay) in enumerate(zip(BATCHES, DECAYS, strict=True)):
        grads = (x.mean() + n) * w
        updates, state = optimizer.update(grads, state, w)
        w = optax.apply_updates(w, updates)
        average = decay * average + (1 - decay) * np.asarray(w, np.float64)
        out.append((np.asarray(w), average, np.linalg.norm(grads)))
    return out


def test_step_updates_parameters_average_and_count(trained):
    _, history, *_ = trained
    for n, ((state, metrics), (w, average, norm)) in enumerate(
        zip(history, reference(), strict=True)
    ):
        assert state.step == n + 1
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        # Update n + 1 is the average's n + 1: counted from 0 its decays would be 1/10, 2/11, ...
        np.testing.assert_allclose(state.averages["ema"]["w"], average, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_metrics_are_of_the_step_that_was_taken(trained):
    _, history, *_ = trained
    w = START
    for n, (x, (state, metrics)) in enumerate(zip(BATCHES, history, strict=True)):
        loss = 0.5 * (x.mean() + n) * np.square(w.astype(np.float64)).sum()
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["seen"], x.max())
        np.testing.assert_allclose(metrics["lr"], 0.1 * min(n + 1, 4) / 4, rtol=1e-6)
        assert metrics["skipped"] == 0
        w = state.params["w"]


def test_state_is_donated_and_stays_sharded(trained):
    first, _, last, _ = trained
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    for tree in (last.params, last.averages["ema"]):
        assert {s.data.shape for s in tree["w"].addressable_shards} == {(2,)}


def test_step_speaks_of_its_mesh_to_the_model(trained):
    """`constrain` inside the loss must find the mesh, or activations stay where they fall."""
    trainer = trained[3]
    specs = trainer.abstract_state, trainer.abstract_frozen, trainer.batch_spec
    text = trainer.step.lower(*specs).as_text()
    assert "sharding_constraint" in text or "@Sharding" in text


def test_without_an_average_none_is_made():
    mesh = mesh_of(MeshConfig(8, 1, 1))
    trainer = make_trainer(dataclasses.replace(QUADRATIC, average=ema.EmaConfig(decay=0.0)), mesh)
    state, _ = trainer.step(trainer.init(), {}, put_batch({"x": BATCHES[0]}, mesh, 8))
    assert state.averages == {} == trainer.abstract_state.averages
    assert state.weights is state.params
    np.testing.assert_allclose(state.params["w"], reference()[0][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("8 and 7\ndo not fit"), r"config\.model does not fit together: 8 and 7; check"),
        (InputError("unet: no such latents"), "^unet: no such latents"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_anything_is_made(error, words):
    def loss(*arguments):
        raise error

    with pytest.raises(InputError, match=words):
        make_trainer(dataclasses.replace(QUADRATIC, loss=loss), mesh_of(*ALONE))


def scaled(trained, extra, frozen, batch, step):
    """`quadratic` of weights times a frozen number, and of a trained extra beside them."""
    value = jnp.square(frozen["scale"] * trained["w"]).sum() + jnp.square(trained["beside"]).sum()
    return batch["x"].mean() * value, Seen({}, {"x": batch["x"]})


def keep_first(state, seen):
    """Keeps the batch's first row, and judges it."""
    first = seen.arrays["x"][0]
    return Turn({"kept": state.extra["kept"] + first}, {"first": first}, [first])


def twice(state, params, extra, seen):
    """Doubles the parameters."""
    return jax.tree.map(lambda x: 2 * x, params), extra


def test_what_follows_the_update_comes_before_the_averages_and_is_judged():
    """An extra is trained beside the parameters, a network is read, neither is averaged."""
    mesh = mesh_of(MeshConfig(8, 1, 1))
    training = dataclasses.replace(
        QUADRATIC,
        loss=scaled,
        optimizer=optax.sgd(lambda n: 0.25),
        learning_rate=lambda n: 0.25,
        average=ema.EmaConfig(decay=0.5, warmup=False),
        init_extra=lambda params: {"beside": jnp.ones(3), "kept": jnp.zeros(())},
        extra_axes={"beside": (None,), "kept": ()},
        trained_extra=("beside",),
        take_turn=keep_first,
        after_update=twice,
        frozen={"scale": leaf()},
        frozen_axes={"scale": ()},
    )
    trainer = make_trainer(training, mesh)
    frozen = jax.device_put({"scale": jnp.float32(0.5)}, trainer.abstract_frozen["scale"].sharding)

    def step(state, first):
        x = np.ones(8, np.float32)
        x[0], x[1] = first, 2 - first  # the mean stays 1
        return trainer.step(state, frozen, put_batch({"x": x}, mesh, 8))

    state, metrics = step(trainer.init(), 0.25)
    # d/dw (0.5 w)^2 = 0.5 w, and 2 of the extra: w - 0.25 * 0.5 w, doubled; 1 - 0.25 * 2.
    np.testing.assert_allclose(state.params["w"], 1.75 * START, rtol=1e-6)
    np.testing.assert_allclose(state.averages["ema"]["w"], (1 + 1.75) / 2 * START, rtol=1e-6)
    np.testing.assert_allclose(state.extra["beside"], np.full(3, 0.5), rtol=1e-6)
    assert state.extra["kept"] == 0.25 and state.averages["ema"].keys() == {"w"}
    assert metrics["first"] == 0.25
    assert metrics["skipped"] == 0 and not frozen["scale"].is_deleted()
    before = jax.device_get(state)
    state, metrics = step(state, np.inf)
    assert metrics["skipped"] == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        dataclasses.replace(jax.device_get(state), step=before.step),
        before,
    )


# Parts of a batch.

ROWS = 32
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
CLIPPED = optim.OptimConfig(lr=0.1, weight_decay=0.1, clip_norm=0.5)


def noisy(trained, extra, frozen, batch, step):
    """Every row's own noise and its own weight: a row in another's place would show."""
    rows = positions(batch)
    noise = normal_like(draw_keys(0, "noise", step, rows), batch["x"])
    error = jnp.tanh((batch["x"] + noise) @ trained["kernel"]) - batch["y"][:, None]
    per_row = jnp.square(error).mean(1)
    parts = {"mse": jnp.square(batch["x"]).mean(), "bin/sum": per_row.sum(), "bin/count": rows.size}
    return per_row.mean(), Seen(parts, {})


def three_steps(count, config, num_devices):
    """In `count` parts: the final state's host copy, and every step's metrics."""
    mesh = mesh_of(config, num_devices)
    trainer = make_trainer(
        Training(
            init=lambda key: {"kernel": jnp.asarray(W)},
            axes={"kernel": ("in_channels", "out_channels")},
            loss=noisy,
            optimizer=optim.make_optimizer(CLIPPED, 10),
            learning_rate=optim.learning_rate(CLIPPED, 10),
            average=ema.EmaConfig(decay=0.9),
            batch={"x": leaf(ROWS, 3), "y": leaf(ROWS)},
            accumulate=count,
        ),
        mesh,
    )
    state, out = trainer.init(), []
    for _ in range(3):
        state, metrics = trainer.step(state, {}, put_batch({"x": X, "y": X.sum(1)}, mesh, ROWS))
        out.append(jax.device_get(metrics))
    return jax.device_get(state), out


@pytest.fixture(scope="module")
def whole():
    return three_steps(1, *ALONE)


@pytest.mark.parametrize(("mesh", "count"), [("1 device", 4), ("1 device", 32), ("2x4", 4)])
def test_parts_of_a_batch_equal_the_whole(whole, mesh, count):
    for got, want in zip(
        jax.tree.leaves(three_steps(count, *MESHES[mesh])), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_rows_carry_their_positions_and_stay_on_their_devices():
    mesh = mesh_of(MeshConfig(2, 4, 1))
    batch = put_batch({"x": X}, mesh, ROWS)

    def split(batch):
        with use_mesh(mesh):
            return micro_batches(batch, 2)

    compiled = jax.jit(split).lower(batch).compile()
    assert not [w for w in ("all-", "collective", "permute") if w in compiled.as_text()]
    parts = compiled(batch)
    assert parts["x"].shape == (2, ROWS // 2, 3)
    np.testing.assert_array_equal(parts["x"], X[np.asarray(parts["position"])])
    assert sorted(np.asarray(parts["position"]).ravel()) == list(range(ROWS))
    of_device = {s.device: s.index[0].start for s in batch["x"].addressable_shards}
    for shard in parts["x"].addressable_shards:
        assert shard.data.shape == (2, ROWS // 16, 3)
        first = of_device[shard.device] or 0
        block = X[first : first + ROWS // 8]
        assert all(any(np.array_equal(row, x) for x in block) for row in shard.data.reshape(-1, 3))


def test_a_batch_that_does_not_split_is_refused():
    mesh = mesh_of(MeshConfig(2, 4, 1))
    check_batch(64, mesh, parts=4)
    with pytest.raises(InputError, match=r"48 must divide by 32, .*accumulate=4; nearest: 64"):
        check_batch(48, mesh, parts=4)
    with pytest.raises(InputError, match="accumulate 0 must be"):
        DenoiserRun(accumulate=0)


def test_an_adversary_and_a_codebook_want_whole_batches():
    with pytest.raises(InputError, match=r"accumulate 2: .*set --config.accumulate=1, or"):
        dataclasses.replace(tiny.AUTOENCODER, accumulate=2)
    plain = dataclasses.replace(tiny.AUTOENCODER, adversarial=adversarial.AdversarialConfig())
    dataclasses.replace(plain, accumulate=2)
    with pytest.raises(InputError, match="accumulate 2"):
        vq = dataclasses.replace(plain.model, latent="vq")
        dataclasses.replace(plain, accumulate=2, model=vq)
