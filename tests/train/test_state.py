"""A fresh state: sharded from birth, the same numbers on every mesh, no buffer used twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train.state import abstract_like, init_state

AXES = {
    "dense": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)},
    "norm": {"scale": (None,)},
}
OPTIMIZER = optax.adamw(optax.linear_schedule(0.0, 1.0, 10))


def init_params():
    a, b = jax.random.split(jax.random.key(0))
    kernel, bias = jax.random.normal(a, (8, 6)), jax.random.normal(b, (6,))
    return {"dense": {"kernel": kernel, "bias": bias}, "norm": {"scale": jnp.ones((5,))}}


@pytest.fixture(scope="module")
def made():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    return init_state(init_params, AXES, OPTIMIZER, mesh, with_ema=True)


def test_parameters_average_and_moments_are_sharded_alike(made):
    state, shardings = made
    adam = state.opt_state[0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        kernel = tree["dense"]["kernel"]
        assert kernel.sharding.spec == P(("fsdp",), ("tensor",))
        assert {s.data.shape for s in kernel.addressable_shards} == {(4, 3)}
        assert tree["norm"]["scale"].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated and adam.count.sharding.is_fully_replicated
    jax.tree.map(
        lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), state, shardings
    )


def test_state_starts_at_step_zero_with_an_average_that_equals_the_parameters(made):
    state, _ = made
    assert state.step.dtype == jnp.int32 and int(state.step) == 0
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert not any(np.any(x) for x in jax.tree.leaves(state.opt_state[0]))
    floats = jax.tree.leaves((state.params, state.ema, state.opt_state[0].mu))
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_values_are_the_same_on_every_mesh(made):
    alone = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    single, _ = init_state(init_params, AXES, OPTIMIZER, alone, with_ema=True)
    for got, want in zip(jax.tree.leaves(made[0]), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(host_array(got), host_array(want))


def test_no_two_leaves_share_a_buffer():
    """The state is donated: one buffer given twice is an error."""
    alone = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state, _ = init_state(init_params, AXES, OPTIMIZER, alone, with_ema=True)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)


def test_state_without_average_holds_none():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    state, shardings = init_state(init_params, AXES, OPTIMIZER, mesh, with_ema=False)
    assert state.ema == {} == shardings.ema


def test_abstract_state_has_shapes_types_and_shardings_and_no_values(made):
    state, _ = made
    like = abstract_like(state)
    for a, x in zip(jax.tree.leaves(like), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.sharding) == (x.shape, x.dtype, x.sharding)
        assert isinstance(a, jax.ShapeDtypeStruct)
