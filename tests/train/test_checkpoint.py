"""Saved and restored bit for bit, on any mesh; what does not fit is named, never ignored."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.errors import InputError
from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train import ema
from ldm_jax.train.checkpoint import Checkpoints, load_weights
from ldm_jax.train.step import Seen, Training, make_trainer

AXES = {"dense": {"kernel": ("in_channels", "out_channels"), "bias": ("out_channels",)}}
OPTIMIZER = optax.adamw(optax.linear_schedule(0.0, 1.0, 10))
META = {"pending_metrics": [{"loss": 1 / 3}]}


def trainer_of(config=MeshConfig(2, 2, 2), width=6, average=True, axes=AXES):
    def init(key):
        def draw(i, *shape):
            return jax.random.normal(jax.random.key(i), shape)

        params = {"dense": {"kernel": draw(0, 8, width), "bias": draw(1, width)}}
        return params | ({"more": draw(2, 4)} if "more" in axes else {})

    training = Training(
        init=init,
        axes=axes,
        loss=lambda trained, extra, frozen, batch, step: (jnp.float32(0), Seen({}, {})),
        optimizer=OPTIMIZER,
        learning_rate=optax.constant_schedule(1.0),
        average=ema.EmaConfig(decay=0.9 if average else 0.0),
        batch={},
    )
    return make_trainer(training, make_mesh(config))


def make_state(**options):
    return trainer_of(**options).init()


def like(*config, **options):
    return trainer_of(*config, **options).abstract_state


def at(state, step):
    """The state with every leaf different from every other and from a fresh one."""
    leaves, structure = jax.tree.flatten(state)
    leaves = [
        x if jnp.issubdtype(x.dtype, jnp.integer) else x / 3 + i for i, x in enumerate(leaves)
    ]
    state = jax.tree.unflatten(structure, leaves)
    return dataclasses.replace(state, step=jax.device_put(jnp.int32(step), state.step.sharding))


@pytest.fixture(scope="module")
def state():
    return at(make_state(), 3)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A workdir with the state of step 3; do not write in it."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, state)
    return workdir


def save(workdir, *states, **options):
    checkpoints = Checkpoints(workdir, **options)
    for state in states:
        checkpoints.save(state, META)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def opened():
    """Opens checkpoints and closes them after the test."""
    made = []

    def make(workdir, **options):
        made.append(Checkpoints(workdir, **options))
        return made[-1]

    yield make
    for checkpoints in made:
        checkpoints.close()


def same(got, want):
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for g, w in leaves:
        assert g.dtype == w.dtype
        np.testing.assert_array_equal(host_array(g), host_array(w))


@pytest.mark.parametrize("config", [MeshConfig(2, 2, 2), MeshConfig(8, 1, 1), MeshConfig(1, 8, 1)])
def test_restored_state_equals_the_saved_one_bit_for_bit_on_any_mesh(saved, state, opened, config):
    abstract = like(config)
    restored, meta = opened(saved).restore(3, abstract)
    same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert meta == META | {"step": 3}
    jax.tree.map(lambda x, a: np.testing.assert_equal(x.sharding, a.sharding), restored, abstract)


def test_saved_buffers_may_be_donated_at_once(tmp_path, state, opened):
    """The step that follows a save overwrites the state while it is being written."""
    donated = jax.tree.map(jnp.copy, state)
    checkpoints = opened(tmp_path)
    checkpoints.save(donated, META)
    jax.tree.map(lambda x: x.delete(), donated)
    checkpoints.wait()
    same(checkpoints.restore(3, like())[0], state)


def test_state_without_average_round_trips_and_lacks_the_item(tmp_path, opened):
    plain = at(make_state(average=False), 2)
    save(tmp_path, plain)
    checkpoints = opened(tmp_path)
    assert checkpoints.items(2) == {"params", "optimizer", "meta"}
    restored, _ = checkpoints.restore(2, like(average=False))
    same(restored, plain)
    assert restored.averages == {}
    with pytest.raises(
        InputError, match=r"/2 lacks \['ema'\]: it was written under another config"
    ):
        checkpoints.restore(2, like())


def test_restore_names_the_leaf_of_another_shape(saved, opened):
    message = (
        r"checkpoints/3: params does not fit: dense/bias has shape \(6,\), the configuration gives "
        r"\(4,\); dense/kernel has shape \(8, 6\), the configuration gives \(8, 4\); use"
    )
    with pytest.raises(InputError, match=message):
        opened(saved).restore(3, like(width=4))


def test_restore_names_a_leaf_that_the_checkpoint_lacks(saved, opened):
    more = like(axes=AXES | {"more": (None,)})
    with pytest.raises(InputError, match=r"params does not fit: more is missing; use the conf"):
        opened(saved).restore(3, more)


def test_restore_names_a_leaf_that_the_checkpoint_has_too_many(tmp_path, opened):
    save(tmp_path, at(make_state(axes=AXES | {"more": (None,)}), 3))
    with pytest.raises(InputError, match=r"params does not fit: more is unexpected; use the conf"):
        opened(tmp_path).restore(3, like())


def test_restore_refuses_the_state_of_another_optimizer(saved, state, opened):
    other = optax.sgd(0.1, momentum=0.9).init(state.params)
    changed = dataclasses.replace(like(), opt_state=other)
    with pytest.raises(InputError, match=r"checkpoints/3: optimizer does not fit: .* is missing"):
        opened(saved).restore(3, changed)


def test_latest_is_the_highest_number_whatever_the_times_of_the_files(tmp_path, state, opened):
    save(tmp_path, at(state, 9), at(state, 10), at(state, 100), keep=3)
    old = time.time() - 1000
    for path in (tmp_path / "checkpoints" / "100").rglob("*"):
        os.utime(path, (old, old))
    os.utime(tmp_path / "checkpoints" / "100", (old, old))
    os.utime(tmp_path / "checkpoints" / "9")
    assert opened(tmp_path).latest() == 100


def test_new_workdir_has_no_latest(tmp_path, opened):
    assert opened(tmp_path).latest() is None


def steps_on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def test_newest_checkpoints_are_kept_and_every_multiple(tmp_path, state):
    states = [at(state, n) for n in (1, 2, 3, 4, 5)]
    save(tmp_path, *states, keep=2, keep_every=2)
    assert steps_on_disk(tmp_path) == [2, 4, 5]


def test_without_multiples_only_the_newest_are_kept(tmp_path, state):
    save(tmp_path, *[at(state, n) for n in (1, 2, 3)], keep=2)
    assert steps_on_disk(tmp_path) == [2, 3]


def test_saving_a_step_again_leaves_the_first_alone(tmp_path, state, opened):
    save(tmp_path, state)
    save(tmp_path, jax.tree.map(lambda x: x if x.ndim == 0 else x + 1, state))
    same(opened(tmp_path).restore(3, like())[0], state)


def test_checkpoint_of_a_killed_run_is_not_half_there(tmp_path, state, opened):
    """Orbax renames a folder when it is whole; one that was not is passed over and swept up."""
    save(tmp_path, state)
    torn = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1"
    (torn / "params").mkdir(parents=True)
    checkpoints = opened(tmp_path)
    assert checkpoints.latest() == 3
    same(checkpoints.restore(3, like())[0], state)
    checkpoints.save(at(state, 7), META)
    checkpoints.wait()
    assert checkpoints.latest() == 7
    assert not torn.exists()


def test_weights_are_the_average_when_there_is_one(saved, state):
    for which, want in (("ema", state.averages["ema"]), ("params", state.params)):
        weights = load_weights(saved, like().params, which=which)
        assert (weights.step, weights.which) == (3, which)
        same(weights.params, want)


def test_weights_of_a_run_without_average_are_the_parameters(tmp_path):
    plain = at(make_state(average=False), 2)
    save(tmp_path, plain)
    weights = load_weights(tmp_path, like(average=False).params, which="params")
    assert weights.which == "params"
    same(weights.params, plain.params)
    with pytest.raises(InputError, match=r"lacks \['ema'\]"):
        load_weights(tmp_path, like(average=False).params, which="ema")


def test_weights_that_are_not_there_are_refused(tmp_path, saved, state):
    with pytest.raises(InputError, match="holds no checkpoint; train it first"):
        load_weights(tmp_path / "new", like().params, which="ema")
    with pytest.raises(InputError, match="holds no checkpoint of step 12; it has"):
        load_weights(saved, like().params, which="ema", step=12)


def test_reading_weights_of_a_running_training_touches_nothing(tmp_path, state):
    """It may be in the middle of a save: its temporary folder is not ours to sweep."""
    save(tmp_path, state)
    running = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp-1" / "params"
    running.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert load_weights(tmp_path, like().params, which="ema").step == 3
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="holds no checkpoint; train it first"):
        load_weights(tmp_path / "typo", like().params, which="ema")
    assert not (tmp_path / "typo").exists()
