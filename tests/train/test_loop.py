"""The loop, around a step without a network: what it writes does not depend on where it stopped."""

import copy
import dataclasses
import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.errors import InputError
from ldm_jax.sharding import MeshConfig, make_mesh, placed, replicated
from ldm_jax.train import loop
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import read_metrics
from ldm_jax.train.state import TrainState
from ldm_jax.train.step import Trainer

NUM_STEPS = 7
CONFIG = loop.LoopConfig(num_steps=NUM_STEPS, log_every=3, checkpoint_every=100)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


class Broken(Exception):
    """A batch that cannot be read."""


def rows(n):
    """The global batch of step n."""
    return np.random.default_rng(n).normal(size=(2,)).astype(np.float32)


class Data:
    """Batches from any step on; raises at `broken`, calls `at[n]` before it gives batch n."""

    def __init__(self, broken=None, at=None):
        self.broken, self.at, self.starts, self.closed = broken, at or {}, [], 0

    def __call__(self, start):
        self.starts.append(start)
        return self._batches(start)

    def _batches(self, start):
        try:
            for n in range(start, 1000):
                if n == self.broken:
                    raise Broken(f"batch {n}")
                self.at.get(n, lambda: None)()
                yield {"x": rows(n), "index": np.arange(2)}
        finally:
            self.closed += 1


def fresh(mesh, params=None):
    params = {"w": jnp.ones(2)} if params is None else params
    state = TrainState(jnp.int32(0), params, {"m": jnp.zeros(2)})
    return jax.device_put(state, replicated(mesh))


def step(state, batch):
    """Depends on the parameters, the batch and the step's number, and forgets nothing."""
    assert set(batch) == {"x"}
    m = 0.9 * state.opt_state["m"] + batch["x"]
    w = state.params["w"] - 0.1 * m
    metrics = {"loss": jnp.square(w).sum(), "x": batch["x"][0]}
    return TrainState(state.step + 1, {"w": w}, {"m": m}), metrics


def trainer_of(mesh, step=step, params=None):
    """Of a step (state, batch), which is not compiled."""

    def init():
        return fresh(mesh, params)

    shapes = jax.eval_shape(init)
    return Trainer(
        mesh=mesh,
        abstract_state=placed(shapes, jax.tree.map(lambda _: replicated(mesh), shapes)),
        abstract_frozen={},
        batch_spec={"x": jax.ShapeDtypeStruct((2,), jnp.float32)},
        init=init,
        init_from=lambda params, kept: fresh(mesh, params),
        step=lambda state, frozen, batch: step(state, batch),
    )


def run(workdir, mesh, data=None, config=CONFIG, step=step, hooks=()):
    trainer = trainer_of(mesh, step)
    return loop.train(
        config, trainer, {}, data or Data(), workdir=workdir, name="test", hooks=hooks
    )


def metrics(workdir):
    """The lines without their times."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def unbroken(mesh, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return run(workdir, mesh), metrics(workdir)


def each_step():
    """The metrics of every step, by plain Python."""
    w, m, out = np.ones(2, np.float32), np.zeros(2, np.float32), []
    for n in range(NUM_STEPS):
        m = np.float32(0.9) * m + rows(n)
        w = w - np.float32(0.1) * m
        out.append({"loss": np.square(w).sum(), "x": rows(n)[0]})
    return out


def test_lines_are_means_over_their_interval_and_the_last_one_is_shorter(unbroken):
    _, lines = unbroken
    every = each_step()
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, part in zip(lines, (every[:3], every[3:6], every[6:]), strict=True):
        for name in ("loss", "x"):
            np.testing.assert_allclose(line[name], np.mean([m[name] for m in part]), rtol=1e-5)


def test_rate_is_a_positive_number_of_images_per_second(mesh, tmp_path):
    run(tmp_path, mesh)
    rates = [line["time/images_per_second"] for line in read_metrics(tmp_path)]
    assert len(rates) == 3 and min(rates) > 0


def check_same_end(workdir, mesh, unbroken, data=None):
    """The same command again ends as the unbroken run did, bit for bit."""
    data = data or Data()
    state = run(workdir, mesh, data)
    want, lines = unbroken
    jax.tree.map(np.testing.assert_array_equal, state, want)
    assert metrics(workdir) == lines
    return data


@pytest.mark.parametrize("stop", range(1, NUM_STEPS))
def test_data_error_saves_the_steps_before_it_and_the_next_start_goes_on(
    mesh, tmp_path, unbroken, stop
):
    data = Data(broken=stop)
    with pytest.raises(Broken, match=f"batch {stop}"):
        run(tmp_path, mesh, data)
    assert data.closed == 1
    assert (tmp_path / "checkpoints" / str(stop)).is_dir()
    assert check_same_end(tmp_path, mesh, unbroken).starts == [stop]


def test_error_in_the_first_batch_leaves_no_checkpoint(mesh, tmp_path, unbroken):
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=0))
    assert not list((tmp_path / "checkpoints").iterdir())
    assert check_same_end(tmp_path, mesh, unbroken).starts == [0]


def test_error_right_after_a_checkpoint_keeps_that_checkpoint(mesh, tmp_path, unbroken):
    config = dataclasses.replace(CONFIG, checkpoint_every=2)
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=4), config)
    # Stopped twice at the same place: nothing new is done, nothing is lost.
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=4), config)
    assert check_same_end(tmp_path, mesh, unbroken).starts == [4]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_finishes_the_step_saves_and_exits_with_its_number(
    mesh, tmp_path, unbroken, name, capsys
):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    # Asked to stop while the fifth batch (number 4) is read: step 5 is the last one done.
    data = Data(at={4: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, mesh, data)
    assert stopped.value.code == 128 + number
    assert "stopped at step 5; the same command resumes" in capsys.readouterr().err
    assert data.closed == 1
    assert signal.getsignal(number) == before
    assert check_same_end(tmp_path, mesh, unbroken).starts == [5]


def test_kill_between_checkpoints_repeats_the_lost_steps_and_their_lines(mesh, tmp_path, unbroken):
    """A failure that saves nothing: lines 6 was written, then the checkpoint of step 5 is all."""
    config = dataclasses.replace(CONFIG, checkpoint_every=5)

    def killed(state, batch):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, mesh, config=config, step=killed)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    # What a killed process may leave besides: a line past the checkpoint, and a torn one.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 1.0}) + '\n{"step": 7, "lo')
    assert check_same_end(tmp_path, mesh, unbroken).starts == [5]


def test_finished_run_started_again_does_nothing(mesh, tmp_path, unbroken):
    run(tmp_path, mesh)

    def never(state, batch):
        raise AssertionError("a finished run took a step")

    data = Data()
    state = run(tmp_path, mesh, data, step=never)
    jax.tree.map(np.testing.assert_array_equal, state, unbroken[0])
    assert metrics(tmp_path) == unbroken[1]


def test_finished_run_goes_on_when_it_may_be_longer(mesh, tmp_path):
    config = dataclasses.replace(CONFIG, num_steps=9)
    run(tmp_path / "long", mesh, config=config)
    run(tmp_path / "short", mesh, config=dataclasses.replace(CONFIG, num_steps=6))
    run(tmp_path / "short", mesh, config=config)
    assert metrics(tmp_path / "short") == metrics(tmp_path / "long")


def test_checkpoints_come_at_every_interval_and_at_the_end(mesh, tmp_path):
    config = dataclasses.replace(CONFIG, checkpoint_every=2, keep_checkpoints=9)
    run(tmp_path, mesh, config=config)
    found = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert found == [2, 4, 6, 7]


def test_unreadable_checkpoint_stops_the_run_and_is_kept(mesh, tmp_path):
    """Never a fresh start by itself."""
    run(tmp_path, mesh)
    longer = dataclasses.replace(CONFIG, num_steps=9)
    other = trainer_of(mesh, params={"v": jnp.ones(3)})
    with pytest.raises(InputError, match=r"params does not fit: v is missing"):
        loop.train(longer, other, {}, Data(), workdir=tmp_path, name="test")
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.latest() == NUM_STEPS
    checkpoints.close()


def test_what_a_checkpoint_is_given_stays_as_it_was(mesh, tmp_path, monkeypatch):
    """It is written in the background, while later steps add metrics."""
    metas = []

    def keep(self, state, meta, score):
        metas.append((meta, copy.deepcopy(meta)))

    monkeypatch.setattr(Checkpoints, "save", keep)
    run(tmp_path, mesh, config=dataclasses.replace(CONFIG, log_every=100, checkpoint_every=2))
    assert [len(meta["pending_metrics"]) for _, meta in metas] == [2, 4, 6, 0]
    assert all(later == then for later, then in metas)


def test_metrics_are_read_one_step_late(mesh, tmp_path, monkeypatch):
    """While step n + 1 is under way, step n is read: no wait for the step just begun."""
    order = []

    def recording(state, batch):
        order.append(f"step {int(state.step)}")
        return step(state, batch)

    add = loop.Meter.add
    monkeypatch.setattr(loop.Meter, "add", lambda self, m: order.append("read") or add(self, m))
    run(tmp_path, mesh, config=dataclasses.replace(CONFIG, num_steps=3), step=recording)
    assert order == ["step 0", "step 1", "read", "step 2", "read", "read"]


def test_a_run_may_begin_with_given_parameters_and_a_resumed_one_goes_on_with_its_own(
    mesh, tmp_path
):
    config, trainer = dataclasses.replace(CONFIG, num_steps=1), trainer_of(mesh)

    def go(config):
        given = {"w": jnp.full(2, 5.0)}
        return loop.train(
            config, trainer, {}, Data(), workdir=tmp_path, name="test", start_from=(given, {})
        )

    first = go(config)
    np.testing.assert_allclose(first.params["w"], 5 - 0.1 * rows(0), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, go(config), first)


def test_networks_that_are_read_reach_every_step_and_no_checkpoint(mesh, tmp_path):
    frozen, seen = {"network": jnp.ones(3)}, []

    def recording(state, frozen, batch):
        seen.append(frozen)
        return step(state, batch)

    trainer = dataclasses.replace(trainer_of(mesh), step=recording)
    loop.train(CONFIG, trainer, frozen, Data(), workdir=tmp_path, name="test")
    assert len(seen) == NUM_STEPS and all(x is frozen for x in seen)
    items = {p.name for p in (tmp_path / "checkpoints" / str(NUM_STEPS)).iterdir() if p.is_dir()}
    assert items == {"params", "optimizer", "meta"}


@pytest.mark.parametrize(
    "field", ["num_steps", "log_every", "checkpoint_every", "keep_checkpoints"]
)
def test_intervals_below_one_are_refused(field):
    with pytest.raises(InputError, match=f"{field} 0 must be at least 1"):
        dataclasses.replace(CONFIG, **{field: 0})


def test_progress_bar_goes_to_the_error_stream_only(mesh, tmp_path, capsys):
    run(tmp_path, mesh)
    out, err = capsys.readouterr()
    assert out == ""
    assert "test" in err and f"/{NUM_STEPS}" in err
    assert sys.stderr is not sys.stdout
