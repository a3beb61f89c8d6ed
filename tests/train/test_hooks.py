"""Hooks in the loop: one line per due step, every snapshot, wherever the run was stopped."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_jax.errors import InputError
from ldm_jax.sharding import MeshConfig, host_array, make_mesh
from ldm_jax.train import ema, loop
from ldm_jax.train.checkpoint import Checkpoints, Snapshots, load_weights
from ldm_jax.train.hooks import Hook, Report, check_keep_best, snapshots
from ldm_jax.train.log import read_metrics
from ldm_jax.train.loop import score_of
from ldm_jax.train.step import Seen, Training, make_trainer
from tests.train.test_loop import CONFIG, Broken, Data, metrics, run, step

EVALUATED = dataclasses.replace(CONFIG, eval_every=2)


def evaluate(state, done):
    """A figure of the weights, so that one taken of another step's would show."""
    assert int(state.step) == done
    figure = float(np.square(np.asarray(state.params["w"])).sum())
    return Report({"figure": figure}, {"picture": np.full((4, 6, 3), done, np.uint8)})


def judged(evaluate=evaluate, every=2):
    return [Hook(every, evaluate)]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def unbroken(mesh, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    run(workdir, mesh, config=EVALUATED, hooks=judged())
    return workdir


def test_every_due_step_and_the_last_have_a_line_of_their_own(unbroken, mesh, tmp_path):
    lines = metrics(unbroken)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 7, 7]
    evaluations = [line for line in lines if "eval/figure" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 6, 7]
    assert all(set(line) == {"step", "eval/figure"} for line in evaluations)
    # The loss of a step is that of the weights after it: they were the ones evaluated.
    assert evaluations[-1]["eval/figure"] == pytest.approx(lines[-2]["loss"], rel=1e-6)
    run(tmp_path, mesh)
    assert [line for line in lines if "loss" in line] == metrics(tmp_path)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_a_resumed_run_has_the_lines_of_an_unbroken_one(mesh, tmp_path, unbroken, stop):
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=stop), EVALUATED, hooks=judged())
    run(tmp_path, mesh, config=EVALUATED, hooks=judged())
    assert metrics(tmp_path) == metrics(unbroken)


@pytest.mark.parametrize("checkpoint_every", [4, 5])
def test_a_killed_run_writes_lost_evaluations_again(mesh, tmp_path, unbroken, checkpoint_every):
    config = dataclasses.replace(EVALUATED, checkpoint_every=checkpoint_every)

    def killed(state, batch):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, mesh, config=config, step=killed, hooks=judged())
    assert metrics(tmp_path)[-1]["step"] == 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "eval/figure": 1.0}) + '\n{"step": 6, "eval/fig')
    run(tmp_path, mesh, config=config, hooks=judged())
    assert metrics(tmp_path) == metrics(unbroken)


def test_a_kill_while_a_checkpoint_is_made_loses_no_line(mesh, tmp_path, unbroken, monkeypatch):
    """The line of a step is on disk before its checkpoint, which alone would hide its absence."""
    config = dataclasses.replace(EVALUATED, checkpoint_every=4)
    save = Checkpoints.save

    def killed(self, state, meta, score):
        save(self, state, meta, score)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, mesh, config=config, hooks=judged())
    monkeypatch.undo()
    run(tmp_path, mesh, config=config, hooks=judged())
    assert metrics(tmp_path) == metrics(unbroken)


def test_a_fault_in_an_evaluation_saves_its_step_first(mesh, tmp_path, unbroken):
    def broken(state, done):
        raise Broken("evaluation")

    with pytest.raises(Broken):
        run(tmp_path, mesh, config=EVALUATED, hooks=judged(broken))
    assert (tmp_path / "checkpoints" / "2").is_dir()
    run(tmp_path, mesh)
    assert metrics(tmp_path) == [line for line in metrics(unbroken) if "loss" in line]


def test_a_diverged_step_is_not_evaluated(mesh, tmp_path):
    def diverging(state, batch):
        state, out = step(state, batch)
        return state, out | ({"loss": np.float32("nan")} if int(state.step) == 2 else {})

    with pytest.raises(InputError, match="loss of step 2 is nan"):
        run(tmp_path, mesh, config=EVALUATED, step=diverging, hooks=judged())
    assert metrics(tmp_path) == []


def test_pictures_go_to_tensorboard_under_their_step(unbroken):
    events = EventAccumulator(str(unbroken), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [e.step for e in events.Images("eval/picture")] == [2, 4, 6, 7]
    assert [e.step for e in events.Scalars("eval/figure")] == [2, 4, 6, 7]


def test_the_rate_leaves_the_time_of_evaluations_out(mesh, tmp_path):
    def slow(state, done):
        time.sleep(1.0 if done == 4 else 0.0)

    config = dataclasses.replace(CONFIG, num_steps=6)
    run(tmp_path, mesh, config=config, hooks=judged(slow, 4))
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "loss" in line}
    assert lines[6]["time/images_per_second"] > 6  # of 6 images, with that second in it


def test_a_negative_interval_is_refused():
    with pytest.raises(InputError, match="eval_every -1 must be at least 0"):
        dataclasses.replace(CONFIG, eval_every=-1)


def scored(figures):
    """An evaluation that gives `figures` by step, in the order of better last."""
    return judged(lambda state, done: Report({"noise": 0.0, "loss": figures[done]}))


def test_the_best_checkpoint_is_kept_beside_the_newest_and_saved_when_it_is_found(mesh, tmp_path):
    config = dataclasses.replace(
        EVALUATED, keep_best="loss", keep_checkpoints=1, checkpoint_every=100
    )
    figures = {2: 3.0, 4: 1.0, 6: 2.0, 7: 5.0}
    run(tmp_path, mesh, config=config, hooks=scored(figures))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 7]
    # A resumed run knows the best of the run before: 1.5 is none.
    longer = dataclasses.replace(config, num_steps=9)
    run(tmp_path, mesh, config=longer, hooks=scored({8: 1.5, 9: 6.0}))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 9]


@pytest.mark.parametrize(
    ("keep_best", "figures", "score"),
    [
        ("", {"loss": 1.0}, None),
        ("loss", {"l2": 9.0, "loss": 1.0}, -1.0),
        ("psnr", {"psnr_db": 30.0}, 30.0),
        ("psnr", {"psnr_db": float("nan")}, None),
        ("loss", {"loss": float("inf")}, None),
        ("fid", {"precision1k-adm-0": 0.5, "fid1k-adm-0": 7.0}, -7.0),
        ("precision", {"precision1k-adm-0": 0.5}, 0.5),
    ],
)
def test_the_score_is_greater_the_better_the_figure(keep_best, figures, score):
    assert score_of(figures, keep_best) == score


def test_a_best_figure_that_no_evaluation_has_is_refused(mesh, tmp_path):
    config = dataclasses.replace(EVALUATED, keep_best="fid")
    with pytest.raises(InputError, match="keep_best 'fid' begins no figure"):
        run(tmp_path, mesh, config=config, hooks=scored({2: 1.0}))
    with pytest.raises(InputError, match="eval_every is 0"):
        dataclasses.replace(CONFIG, keep_best="loss")


def test_hooks_run_in_their_order_share_one_line_and_are_closed_whatever_happens(mesh, tmp_path):
    calls = []

    def hook(name, every, report=None):
        return Hook(
            every,
            lambda state, done: calls.append((name, done)) or report,
            settle=lambda: calls.append((name, "settled")),
            close=lambda: calls.append((name, "closed")),
        )

    hooks = [hook("a", 2, Report({"x": 1.0})), hook("b", 3), hook("c", 2, Report({"y": 2.0}))]
    config = dataclasses.replace(CONFIG, checkpoint_every=4)
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=4), config, hooks=hooks)
    assert calls == [
        ("a", 2), ("c", 2), ("b", 3), ("a", 4), ("c", 4),
        *[(name, "settled") for name in "abc"], *[(name, "closed") for name in "abc"],
    ]  # fmt: skip
    lines = [line for line in metrics(tmp_path) if "loss" not in line]
    assert lines == [{"step": n, "eval/x": 1.0, "eval/y": 2.0} for n in (2, 4)]


def test_a_hook_that_fails_to_close_leaves_nothing_else_open(mesh, tmp_path):
    closed, data = [], Data()

    def broken():
        raise Broken("closing")

    hooks = [
        Hook(2, evaluate, close=broken),
        Hook(2, nothing_found, close=lambda: closed.append(1)),
    ]
    with pytest.raises(Broken, match="closing"):
        run(tmp_path, mesh, data, hooks=hooks)
    assert closed == [1] and data.closed == 1
    assert (tmp_path / "checkpoints" / str(CONFIG.num_steps)).is_dir()
    lock = loop.lock_workdir(tmp_path)  # it is free again
    assert lock
    lock.close()


def nothing_found(state, done):
    return None


@pytest.mark.parametrize(
    "report", [Report({"x": 1.0}), Report(pictures={"x": np.zeros((1, 1, 3))})]
)
def test_two_hooks_with_one_name_are_a_defect(mesh, tmp_path, report):
    def one(state, done):
        return report

    def other(state, done):
        return report

    with pytest.raises(ValueError, match=r"one.* and .*other.* both report 'x'"):
        run(tmp_path, mesh, config=EVALUATED, hooks=[Hook(2, one), Hook(2, other)])


def test_a_best_figure_that_no_hook_declares_is_refused_where_all_of_them_declare():
    hooks = [
        Hook(2, evaluate, figures=("loss", "loss_bin/0")),
        Hook(2, evaluate, figures=("fid5-",)),
    ]
    for keep_best in ("", "loss", "loss_b", "fid", "fid5-1a2b"):
        check_keep_best(keep_best, hooks)
        check_keep_best("other", [*hooks, Hook(2, evaluate)])
    for keep_best in ("losses", "fid6", "x"):
        with pytest.raises(InputError, match=f"keep_best '{keep_best}' begins no .*'loss_bin/0'"):
            check_keep_best(keep_best, hooks)


# Snapshots of averages, in a training on eight shards.

EMA = ema.EmaConfig(decay=0.6, warmup=False, more=(0.9,), power=(0.05, 0.1), snapshot_every=2)
NAMES = ["ema", "ema-0.9", "ema-power-0.05", "ema-power-0.1"]
START = np.arange(1.0, 9.0, dtype=np.float32)
LOOP = loop.LoopConfig(num_steps=7, log_every=1, checkpoint_every=3, keep_checkpoints=5)


def distance(trained, extra, frozen, batch, step):
    return jnp.square(trained["w"] - batch["x"]).mean(), Seen({}, {})


AVERAGED = Training(
    init=lambda key: {"w": jnp.asarray(START)},
    axes={"w": ("in_channels",)},
    loss=distance,
    optimizer=optax.sgd(lambda n: 0.3),
    learning_rate=lambda n: 0.3,
    average=EMA,
    batch={"x": jax.ShapeDtypeStruct((8,), jnp.float32)},
)


def vectors(broken=None):
    def read(start):
        for n in range(start, 100):
            if n == broken:
                raise Broken(f"batch {n}")
            yield {"x": np.random.default_rng(n).normal(size=8).astype(np.float32)}

    return read


def train(workdir, trainer, broken=None, every=EMA.snapshot_every):
    hooks = [snapshots(workdir, every)] if every else []
    return loop.train(LOOP, trainer, {}, vectors(broken), workdir=workdir, name="test", hooks=hooks)


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(AVERAGED, make_mesh(MeshConfig(1, 8, 1)))


@pytest.fixture(scope="module")
def averaged(trainer, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("averaged")
    return train(workdir, trainer), workdir


def host(tree):
    return jax.tree.map(host_array, tree)


def test_averages_are_sharded_like_the_parameters_and_share_no_buffer(trainer):
    state = trainer.init()
    assert list(state.averages) == NAMES
    trees = (state.params, *state.averages.values())
    for tree in trees:
        assert tree["w"].sharding.spec == P(("fsdp",)) and tree["w"].dtype == jnp.float32
        np.testing.assert_array_equal(tree["w"], START)
    pointers = [
        shard.data.unsafe_buffer_pointer()
        for tree in trees
        for shard in tree["w"].addressable_shards
    ]
    assert len(set(pointers)) == len(pointers)


def test_averages_of_eight_shards_are_those_of_one_device(averaged, mesh, tmp_path):
    got = host(averaged[0].averages)
    alone = host(train(tmp_path, make_trainer(AVERAGED, mesh), every=0).averages)
    for name in NAMES:
        np.testing.assert_allclose(got[name]["w"], alone[name]["w"], rtol=1e-6)
    values = [got[name]["w"] for name in NAMES]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(values) for b in values[:i])


def test_averages_and_snapshots_of_a_resumed_run_are_those_of_an_unbroken_one(
    trainer, averaged, tmp_path
):
    # Step 5 is the last and is saved; the snapshot after step 4 stands already.
    with pytest.raises(Broken, match="batch 5"):
        train(tmp_path, trainer, broken=5)
    assert {step for step, _ in read(tmp_path)} == {2, 4}
    resumed = train(tmp_path, trainer)
    for got, want in zip(
        jax.tree.leaves(host(resumed)), jax.tree.leaves(host(averaged[0])), strict=True
    ):
        assert got.tobytes() == want.tobytes()
    got, want = read(tmp_path), read(averaged[1])
    assert sorted(want) == [(s, w) for s in (2, 4, 6, 7) for w in (0.05, 0.1)]
    assert got == want


def read(workdir):
    """Every snapshot's bytes by (step, width), as a mesh of another shape reads them."""
    like = make_trainer(AVERAGED, make_mesh(MeshConfig(2, 4, 1))).abstract_state.params
    snapshots = Snapshots(workdir, read_only=True)
    found = {k: host_array(snapshots.load(*k, like)["w"]).tobytes() for k in snapshots.kept()}
    snapshots.close()
    return found


def test_a_snapshot_is_the_average_of_its_step(trainer, averaged):
    like = trainer.abstract_state.params
    for width in (0.05, 0.1):
        weights = load_weights(averaged[1], like, which=f"ema-power-{width}", step=6)
        assert host_array(weights.params["w"]).tobytes() == read(averaged[1])[6, width]


def test_a_training_without_snapshots_writes_none_and_a_refused_one_no_folder(trainer, tmp_path):
    train(tmp_path, trainer, every=0)
    assert not (tmp_path / "ema").exists()
    with pytest.raises(Broken):
        train(tmp_path / "refused", trainer, broken=0)
    assert not (tmp_path / "refused" / "ema").exists()
