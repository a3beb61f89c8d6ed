"""A fresh state: sharded from birth, the same numbers on every mesh, no buffer used twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train import ema
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Seen, Training, make_trainer


def test_weights_are_the_main_average_or_the_parameters():
    params, main, other = ({"w": jnp.float32(i)} for i in range(3))
    state = TrainState(jnp.int32(0), params, {}, {"ema-0.9": other, "ema": main})
    assert state.weights is main
    assert TrainState(jnp.int32(0), params, {}, {"ema-0.9": other}).weights is params
    assert TrainState(jnp.int32(0), params, {}).weights is params


def test_every_field_is_data():
    state = TrainState(*(jnp.float32(i) for i in range(3)), {"ema": jnp.zeros(2)}, {"e": 1.0})
    leaves = jax.tree_util.tree_leaves_with_path(state)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [
        ".step", ".params", ".opt_state", ".averages['ema']", ".extra['e']"
    ]  # fmt: skip


ALONE = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def init_params(key):
    a, b = jax.random.split(key)
    kernel, bias = jax.random.normal(a, (8, 6)), jax.random.normal(b, (6,))
    return {"dense": {"kernel": kernel, "bias": bias}, "norm": {"scale": jnp.ones((5,))}}


def linear_loss(trained, extra, frozen, batch, step):
    y = batch["x"] @ trained["dense"]["kernel"] + trained["dense"]["bias"][None]
    return jnp.square(y).mean() + trained["norm"]["scale"].sum(), Seen({}, {})


LINEAR = Training(
    init=init_params,
    axes={
        "dense": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)},
        "norm": {"scale": (None,)},
    },
    loss=linear_loss,
    optimizer=optax.adamw(optax.linear_schedule(0.0, 1.0, 10)),
    learning_rate=optax.linear_schedule(0.0, 1.0, 10),
    average=ema.EmaConfig(),
    batch={"x": jax.ShapeDtypeStruct((8, 8), jnp.float32)},
)


@pytest.fixture(scope="module")
def linear():
    """A trainer and its fresh state."""
    trainer = make_trainer(LINEAR, make_mesh(MeshConfig(2, 2, 2)))
    return trainer, trainer.init()


@pytest.fixture(scope="module")
def single():
    """The fresh state on one device."""
    return make_trainer(LINEAR, ALONE).init()


def test_parameters_average_and_moments_are_sharded_alike(linear):
    state = linear[1]
    adam = state.opt_state[0]
    for tree in (state.params, state.averages["ema"], adam.mu, adam.nu):
        kernel = tree["dense"]["kernel"]
        assert kernel.sharding.spec == P(("fsdp",), ("tensor",))
        assert {s.data.shape for s in kernel.addressable_shards} == {(4, 3)}
        assert tree["norm"]["scale"].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated and adam.count.sharding.is_fully_replicated


def test_abstract_state_has_shapes_types_and_shardings_and_no_values(linear):
    trainer, state = linear
    like = trainer.abstract_state
    assert jax.tree.structure(like) == jax.tree.structure(state)
    for a, x in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (x.shape, x.dtype)
        assert x.sharding.is_equivalent_to(a.sharding, x.ndim)
        assert isinstance(a, jax.ShapeDtypeStruct)
    assert trainer.batch_spec["x"].shape == (8, 8) and trainer.batch_spec["x"].sharding


def test_state_starts_at_step_zero_with_an_average_that_equals_the_parameters(linear):
    state = linear[1]
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.averages["ema"], state.params)
    assert state.weights is state.averages["ema"]
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state[0]))
    floats = jax.tree.leaves((state.params, state.averages, state.opt_state[0].mu))
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_values_are_the_same_on_every_mesh(linear, single):
    for got, want in zip(jax.tree.leaves(linear[1]), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(host_array(got), host_array(want))


def test_the_seed_draws_the_parameters(single):
    other = dataclasses.replace(LINEAR, seed=1)
    kernel = make_trainer(other, ALONE).init().params["dense"]["kernel"]
    assert not np.any(np.asarray(kernel) == single.params["dense"]["kernel"])


def test_no_two_leaves_share_a_buffer(single):
    """The state is donated: one buffer given twice is an error."""
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(single)]
    assert len(set(pointers)) == len(pointers)


def test_a_state_from_given_parameters_is_fresh_but_for_them_and_takes_none_away(linear):
    trainer, state = linear
    given = jax.tree.map(lambda x: x + 1, state.params)
    started = trainer.init_from(given)
    jax.tree.map(np.testing.assert_array_equal, started.params, given)
    jax.tree.map(np.testing.assert_array_equal, started.averages["ema"], given)
    assert int(started.step) == 0 and not np.any(started.opt_state[0].mu["dense"]["kernel"])
    jax.tree.map(
        lambda a, b: np.testing.assert_(a.sharding.is_equivalent_to(b.sharding, a.ndim)),
        started,
        state,
    )
