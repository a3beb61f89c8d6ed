"""Several averages in one training: sharded like the parameters, saved, resumed bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train import ema, loop
from ldm_jax.train.checkpoint import load_weights
from ldm_jax.train.snapshots import Snapshots
from ldm_jax.train.state import init_state
from ldm_jax.train.steps import make_step

EMA = ema.EmaConfig(decay=0.6, warmup=False, more=(0.9,), power=(0.05, 0.1), snapshot_every=2)
NAMES = ["0.9", "power-0.05", "power-0.1"]
START = np.arange(1.0, 9.0, dtype=np.float32)
LOOP = loop.LoopConfig(num_steps=7, log_every=1, checkpoint_every=3, keep_checkpoints=5)


def loss(params, batch, step):
    return jnp.square(params["w"] - batch["x"]).mean(), {}


def built(config=MeshConfig(1, 8, 1), devices=None):
    mesh = make_mesh(config, devices)
    optimizer = optax.sgd(lambda n: 0.3)
    state, shardings = init_state(
        lambda: {"w": jnp.asarray(START)},
        {"w": ("in_channels",)},
        optimizer,
        mesh,
        with_ema=True,
        averages=ema.average_names(EMA),
    )
    step = make_step(loss, optimizer, lambda n: 0.3, EMA, mesh, shardings)
    return state, step, mesh


def batches(broken=None):
    def read(start):
        for n in range(start, 100):
            if n == broken:
                raise RuntimeError(f"batch {n}")
            yield {"x": np.random.default_rng(n).normal(size=8).astype(np.float32)}

    return read


def train(workdir, made, broken=None, every=EMA.snapshot_every):
    state, step, mesh = made
    return loop.train(
        LOOP,
        workdir=workdir,
        name="test",
        state=jax.tree.map(jnp.copy, state),
        step=step,
        batches=batches(broken),
        batch_size=8,
        mesh=mesh,
        snapshot_every=every,
    )


@pytest.fixture(scope="module")
def made():
    return built()


@pytest.fixture(scope="module")
def unbroken(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return train(workdir, made), workdir


def host(tree):
    return jax.tree.map(host_array, tree)


def test_averages_are_sharded_like_the_parameters_and_share_no_buffer(made):
    state = made[0]
    assert list(state.averages) == NAMES
    for tree in (state.params, state.ema, *state.averages.values()):
        assert tree["w"].sharding.spec == P(("fsdp",)) and tree["w"].dtype == jnp.float32
        np.testing.assert_array_equal(tree["w"], START)
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for tree in (state.params, state.ema, *state.averages.values())
        for shard in tree["w"].addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)


def test_averages_of_eight_shards_are_those_of_one_device(unbroken, tmp_path):
    got = host(unbroken[0].averages)
    alone = host(train(tmp_path, built(MeshConfig(1, 1, 1), jax.devices()[:1]), every=0).averages)
    for name in NAMES:
        np.testing.assert_allclose(got[name]["w"], alone[name]["w"], rtol=1e-6)
    values = [got[name]["w"] for name in NAMES] + [host_array(unbroken[0].ema["w"])]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(values) for b in values[:i])


def test_averages_and_snapshots_of_a_resumed_run_are_those_of_an_unbroken_one(
    made, unbroken, tmp_path
):
    # Step 5 is the last and is saved; the snapshot after step 4 stands already.
    with pytest.raises(RuntimeError, match="batch 5"):
        train(tmp_path, made, broken=5)
    assert {step for step, _ in read(tmp_path)} == {2, 4}
    resumed = train(tmp_path, made)
    for got, want in zip(
        jax.tree.leaves(host(resumed)), jax.tree.leaves(host(unbroken[0])), strict=True
    ):
        assert got.tobytes() == want.tobytes()
    got, want = read(tmp_path), read(unbroken[1])
    assert sorted(want) == [(s, w) for s in (2, 4, 6, 7) for w in (0.05, 0.1)]
    assert got == want


def read(workdir):
    """Every snapshot's bytes by (step, width)."""
    like = built(MeshConfig(2, 4, 1))[0].params
    like = {"w": jax.ShapeDtypeStruct(like["w"].shape, "float32", sharding=like["w"].sharding)}
    snapshots = Snapshots(workdir, read_only=True)
    found = {k: host_array(snapshots.load(*k, like)["w"]).tobytes() for k in snapshots.kept()}
    snapshots.close()
    return found


def test_a_snapshot_is_the_average_of_its_step(made, unbroken, tmp_path):
    config = dict(like=made[0].params, step=6)
    for width in (0.05, 0.1):
        weights = load_weights(unbroken[1], which=f"ema-power-{width}", **config)
        assert host_array(weights.params["w"]).tobytes() == read(unbroken[1])[6, width]


def test_a_training_without_snapshots_writes_none(made, tmp_path):
    train(tmp_path, made, every=0)
    assert not (tmp_path / "ema").exists()
