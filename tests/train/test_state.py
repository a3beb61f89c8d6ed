"""A state: sharded from birth whatever its optimizer, the same on every mesh, saved, restored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax.sharding import MeshConfig, host_array, key_name, make_mesh
from ldm_jax.train import ema, optim
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Seen, Training, make_trainer
from tests.train.test_optim import EDGES, SLOPES, TREE


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
    started = trainer.init_from(given, {})
    jax.tree.map(np.testing.assert_array_equal, started.params, given)
    jax.tree.map(np.testing.assert_array_equal, started.averages["ema"], given)
    assert int(started.step) == 0 and not np.any(started.opt_state[0].mu["dense"]["kernel"])
    jax.tree.map(
        lambda a, b: np.testing.assert_(a.sharding.is_equivalent_to(b.sharding, a.ndim)),
        started,
        state,
    )


AXES = {
    "conv_in": {
        "kernel": (None, None, "in_channels", "out_channels"),
        "bias": ("out_channels",),
    },
    "hidden": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)},
    "large": {"kernel": ("in_channels", "out_channels")},
    "embedding": ("vocab", "in_channels"),
}


def optimized(name):
    """A trainer on eight devices whose gradients are always the same, and a fresh state."""
    config = optim.OptimConfig(name=name, lr=0.1, warmup_steps=2)

    def loss(trained, extra, frozen, batch, step):
        products = jax.tree.map(lambda p, g: (p * g).sum(), trained, SLOPES)
        return sum(jax.tree.leaves(products)), Seen({}, {})

    training = Training(
        init=lambda key: jax.tree.map(jnp.asarray, TREE),
        axes=AXES,
        loss=loss,
        optimizer=optim.make_optimizer(config, 10, EDGES),
        learning_rate=optim.learning_rate(config, 10),
        average=ema.EmaConfig(decay=0.0),
        batch={},
    )
    trainer = make_trainer(training, make_mesh(MeshConfig(2, 2, 2)))
    return trainer, trainer.init()


def bytes_on_a_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_is_sharded_as_the_parameters_are(name):
    state = optimized(name)[1]
    of_params = bytes_on_a_device(state.params)
    assert of_params < 0.3 * sum(x.nbytes for x in jax.tree.leaves(TREE))
    whole = {"adamw": 2, "adam": 2, "lion": 1}.get(name)
    if whole:
        assert 0 <= bytes_on_a_device(state.opt_state) - whole * of_params <= 16  # the counts
    by_path = {p: s for p, s in _specs(state.params)}
    for path, spec in _specs(state.opt_state):
        same = [s for p, s in by_path.items() if path[0].endswith(p[0]) and path[1] == p[1]]
        assert not same or spec == same[0], path
        assert same or spec == (), path


def _specs(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = "/".join(key_name(k) for k in path)
        spec = leaf.sharding.spec
        yield (name, leaf.shape), tuple(spec) if any(spec) else ()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_restored_state_goes_on_bit_for_bit(name, tmp_path):
    trainer, state = optimized(name)

    def step(state):
        return trainer.step(state, {}, {})[0]

    state = step(step(state))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(2, trainer.abstract_state)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(host_array(a), host_array(b)),
        step(restored),
        step(state),
    )
