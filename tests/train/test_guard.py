"""A step that is not finite changes nothing, is told of, and does not stop the run by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.sharding import MeshConfig, make_mesh, put_batch
from ldm_jax.train import ema, optim
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.hooks import Hook, Report
from ldm_jax.train.step import Seen, Training, keep_finite, make_trainer, updates_done
from tests.train import test_loop
from tests.train.test_loop import CONFIG, NUM_STEPS, Broken, Data, metrics, rows, run


def built(name="adamw"):
    """Least squares, whose loss is finite and whose gradient is not where x is 0 and y is not."""
    mesh = make_mesh(MeshConfig(2, 4, 1))
    config = optim.OptimConfig(
        name=name, lr=0.1, warmup_steps=4, weight_decay=0.1 * (name != "adam")
    )

    def loss(trained, extra, frozen, batch, step):
        kernel = trained["hidden"]["kernel"]
        return jnp.sqrt(jnp.abs(batch["x"] * kernel.sum()) + batch["y"]).mean(), Seen({}, {})

    row = jax.ShapeDtypeStruct((8,), jnp.float32)
    trainer = make_trainer(
        Training(
            init=lambda key: {"hidden": {"kernel": jnp.ones((8, 2))}},
            axes={"hidden": {"kernel": ("in_channels", "out_channels")}},
            loss=loss,
            optimizer=optim.make_optimizer(config, 10),
            learning_rate=optim.learning_rate(config, 10),
            average=ema.EmaConfig(),
            batch={"x": row, "y": row},
        ),
        mesh,
    )
    return trainer.init(), lambda state, x, y: trainer.step(
        state, {}, put_batch({"x": np.float32(x), "y": np.float32(y)}, mesh, 8)
    )


GOOD, ZERO, NAN = np.ones(8), np.zeros(8), np.where(np.arange(8) == 3, np.nan, 1.0)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_bad_steps_leave_every_bit_and_the_next_one_goes_on(name):
    state, step = built(name)
    state, seen = step(state, GOOD, GOOD)
    assert seen["skipped"] == 0 and int(updates_done(state.opt_state)) == 1
    before = jax.device_get(state)
    for x, y in ((NAN, GOOD), (ZERO, ZERO)):
        state, seen = step(state, x, y)
        assert seen["skipped"] == 1
    assert np.isfinite(seen["loss"]) and not np.isfinite(seen["grad_norm"])
    after = jax.device_get(state)
    assert after.step == before.step + 2
    jax.tree.map(
        np.testing.assert_array_equal, dataclasses.replace(after, step=before.step), before
    )
    state, seen = step(state, GOOD, GOOD)
    np.testing.assert_allclose(seen["lr"], 0.05, rtol=1e-6)  # of the second update, at step 4
    assert not np.array_equal(state.params["hidden"]["kernel"], before.params["hidden"]["kernel"])


class Holes(Data):
    """The loop's batches, those of the steps in `bad` not finite; examples 10 n and 10 n + 1."""

    def __init__(self, bad, **options):
        super().__init__(**options)
        self.bad = bad

    def _batches(self, start):
        for n, batch in enumerate(super()._batches(start), start):
            x = np.full(2, np.nan, np.float32) if n in self.bad else batch["x"]
            yield {"x": x, "index": 10 * n + np.arange(2)}


def guarded(state, batch):
    new, seen = test_loop.step(state, batch)
    new, skipped = keep_finite(state, lambda _: new, seen["loss"])
    return new, seen | {"skipped": skipped}


PATIENT = dataclasses.replace(CONFIG, max_bad_steps=2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def test_skipped_steps_are_told_with_their_examples_and_left_out_of_the_means(
    mesh, tmp_path, capsys
):
    run(tmp_path, mesh, Holes({1, 2, 5}), PATIENT, step=guarded)
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.partition("the loss of ")[2] for line in told] == [
        f"step {n + 1} is nan: it is skipped; it had the examples {10 * n}, {10 * n + 1}"
        for n in (1, 2, 5)
    ]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert [line.get("skipped_steps") for line in lines] == [2, 1, None]
    np.testing.assert_allclose(lines[0]["x"], rows(0)[0], rtol=1e-6)
    np.testing.assert_allclose(lines[1]["x"], np.mean([rows(3)[0], rows(4)[0]]), rtol=1e-6)


def test_too_many_in_a_row_stop_the_run_and_are_not_saved(mesh, tmp_path):
    config = dataclasses.replace(PATIENT, checkpoint_every=1)
    with pytest.raises(InputError, match=r"step 5 is nan, and so it was 3 times in a row: trainin"):
        run(tmp_path, mesh, Holes({2, 3, 4}), config, step=guarded)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}
    with pytest.raises(InputError, match="the loss of step 3 is nan: training has diverged"):
        run(tmp_path / "0", mesh, Holes({2}), CONFIG, step=guarded)


def test_a_checkpoint_due_at_a_bad_step_follows_at_the_next_good_one(mesh, tmp_path):
    config = dataclasses.replace(PATIENT, checkpoint_every=3)
    run(tmp_path, mesh, Holes({2, 3}), config, step=guarded)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"6", str(NUM_STEPS)}
    run(tmp_path / "end", mesh, Holes({NUM_STEPS - 1}), config, step=guarded)
    assert (tmp_path / "end" / "checkpoints" / str(NUM_STEPS)).is_dir()


@pytest.mark.parametrize("stop", range(1, NUM_STEPS))
def test_resumed_among_bad_steps_equals_unbroken(mesh, tmp_path, stop):
    bad = {1, 2, 4}
    want = run(tmp_path / "unbroken", mesh, Holes(bad), PATIENT, step=guarded)
    with pytest.raises(Broken):
        run(tmp_path / "broken", mesh, Holes(bad, broken=stop), PATIENT, step=guarded)
    got = run(tmp_path / "broken", mesh, Holes(bad), PATIENT, step=guarded)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")


def test_bad_steps_in_a_row_are_counted_over_a_restart(mesh, tmp_path):
    with pytest.raises(Broken):
        run(tmp_path, mesh, Holes({2, 3, 4}, broken=4), PATIENT, step=guarded)
    with pytest.raises(InputError, match="step 5 is nan, and so it was 3 times in a row"):
        run(tmp_path, mesh, Holes({2, 3, 4}), PATIENT, step=guarded)


def test_a_negative_patience_is_refused():
    with pytest.raises(InputError, match="max_bad_steps -1 must be at least 0"):
        dataclasses.replace(CONFIG, max_bad_steps=-1)


@pytest.mark.parametrize(
    ("bad", "kept", "best"), [({3}, {"5", "8"}, 1.0), ({3, 4, 5}, {"7", "8"}, 1.0)]
)
def test_a_best_evaluation_at_a_bad_step_is_kept_with_its_score(mesh, tmp_path, bad, kept, best):
    config = dataclasses.replace(
        PATIENT, num_steps=8, eval_every=2, keep_best="loss", keep_checkpoints=1, max_bad_steps=3
    )
    # While steps are skipped the weights, and so their figures, stay as they are.
    figures = {2: 5.0, 4: 1.0, 6: 1.0 if 5 in bad else 3.0, 8: 9.0}
    hooks = [Hook(2, lambda state, done: Report({"loss": figures[done]}))]
    run(tmp_path, mesh, Holes(bad), config, step=guarded, hooks=hooks)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == kept
    checkpoints = Checkpoints(tmp_path, keep_best=True, read_only=True)
    assert checkpoints.best() == -best
    checkpoints.close()
