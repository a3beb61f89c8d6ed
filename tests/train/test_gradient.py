"""A batch taken in parts is the whole batch: the same draws, loss, gradient and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.keys import normal_like
from ldm_jax.runs.settings import DenoiserRun
from ldm_jax.sharding import MeshConfig, check_batch, make_mesh, put_batch, use_mesh
from ldm_jax.train import adversarial, ema, optim, steps
from ldm_jax.train.gradient import micro_batches, positions
from ldm_jax.train.state import init_state
from tests import tiny

ROWS = 32
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
OPTIM = optim.OptimConfig(lr=0.1, weight_decay=0.1, clip_norm=0.5)


def loss(params, batch, step):
    """Every row's own noise and its own weight: a row in another's place would show."""
    rows = positions(batch)
    noise = normal_like(steps.draw_keys(0, "noise", step, rows), batch["x"])
    error = jnp.tanh((batch["x"] + noise) @ params["kernel"]) - batch["y"][:, None]
    per_row = jnp.square(error).mean(1)
    parts = {"mse": jnp.square(batch["x"]).mean(), "bin/sum": per_row.sum(), "bin/count": rows.size}
    return per_row.mean(), parts


def trained(count, config, num_devices):
    """Three steps in `count` parts: the final state's host copy, and every step's metrics."""
    mesh = make_mesh(config, jax.devices()[:num_devices])
    optimizer = optim.make_optimizer(OPTIM, 10)
    state, shardings = init_state(
        lambda: {"kernel": jnp.asarray(W)},
        {"kernel": ("in_channels", "out_channels")},
        optimizer,
        mesh,
        with_ema=True,
    )
    average, rate = ema.EmaConfig(decay=0.9), optim.learning_rate(OPTIM, 10)
    step = steps.make_step(loss, optimizer, rate, average, mesh, shardings, count)
    batch = {"x": X, "y": X.sum(1)}
    out = []
    for _ in range(3):
        state, metrics = step(state, put_batch(batch, mesh, ROWS))
        out.append(jax.device_get(metrics))
    return jax.device_get(state), out


MESHES = {"1 device": (MeshConfig(1, 1, 1), 1), "2x4": (MeshConfig(2, 4, 1), 8)}


@pytest.fixture(scope="module")
def whole():
    return trained(1, *MESHES["1 device"])


@pytest.mark.parametrize(("mesh", "count"), [("1 device", 4), ("1 device", 32), ("2x4", 4)])
def test_parts_of_a_batch_equal_the_whole(whole, mesh, count):
    for got, want in zip(
        jax.tree.leaves(trained(count, *MESHES[mesh])), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_rows_carry_their_positions_and_stay_on_their_devices():
    mesh = make_mesh(MeshConfig(2, 4, 1))
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
        own = X[first : first + ROWS // 8]
        assert all(any(np.array_equal(row, x) for x in own) for row in shard.data.reshape(-1, 3))


def test_a_batch_that_does_not_split_is_refused():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    check_batch(64, mesh, parts=4)
    with pytest.raises(InputError, match=r"48 must divide by 32 .*accumulate=4\); nearest: 64"):
        check_batch(48, mesh, parts=4)
    with pytest.raises(InputError, match="accumulate 0 must be at least 1"):
        DenoiserRun(accumulate=0)


def test_an_adversary_and_a_codebook_want_whole_batches():
    with pytest.raises(InputError, match=r"accumulate 2: .*set --config.accumulate=1, or"):
        dataclasses.replace(tiny.AUTOENCODER, accumulate=2)
    plain = dataclasses.replace(tiny.AUTOENCODER, adversarial=adversarial.AdversarialConfig())
    dataclasses.replace(plain, accumulate=2)
    with pytest.raises(InputError, match="accumulate 2"):
        vq = dataclasses.replace(plain.model, latent="vq")
        dataclasses.replace(plain, accumulate=2, model=vq)
