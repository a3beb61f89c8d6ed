"""Evaluations in the loop: one line per due step, wherever the run was stopped."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_jax.errors import InputError
from ldm_jax.sharding import MeshConfig, make_mesh
from ldm_jax.train.checkpoint import Checkpoints
from ldm_jax.train.log import read_metrics
from ldm_jax.train.loop import score_of
from tests.train.test_loop import CONFIG, Broken, Data, metrics, run, step

EVALUATED = dataclasses.replace(CONFIG, eval_every=2)


def evaluate(state, done):
    """A figure of the weights, so that one taken of another step's would show."""
    assert int(state.step) == done
    figure = float(np.square(np.asarray(state.params["w"])).sum())
    return {"figure": figure}, {"picture": np.full((4, 6, 3), done, np.uint8)}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def unbroken(mesh, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    run(workdir, mesh, config=EVALUATED, evaluate=evaluate)
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


def test_without_an_interval_nothing_is_evaluated(mesh, tmp_path):
    def never(state, done):
        raise AssertionError("evaluated")

    run(tmp_path, mesh, evaluate=never)
    assert all("loss" in line for line in metrics(tmp_path))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_a_resumed_run_has_the_lines_of_an_unbroken_one(mesh, tmp_path, unbroken, stop):
    with pytest.raises(Broken):
        run(tmp_path, mesh, Data(broken=stop), EVALUATED, evaluate=evaluate)
    run(tmp_path, mesh, config=EVALUATED, evaluate=evaluate)
    assert metrics(tmp_path) == metrics(unbroken)


@pytest.mark.parametrize("checkpoint_every", [4, 5])
def test_a_killed_run_writes_lost_evaluations_again(mesh, tmp_path, unbroken, checkpoint_every):
    config = dataclasses.replace(EVALUATED, checkpoint_every=checkpoint_every)

    def killed(state, batch):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return step(state, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, mesh, config=config, step=killed, evaluate=evaluate)
    assert metrics(tmp_path)[-1]["step"] == 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "eval/figure": 1.0}) + '\n{"step": 6, "eval/fig')
    run(tmp_path, mesh, config=config, evaluate=evaluate)
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
        run(tmp_path, mesh, config=config, evaluate=evaluate)
    monkeypatch.undo()
    run(tmp_path, mesh, config=config, evaluate=evaluate)
    assert metrics(tmp_path) == metrics(unbroken)


def test_a_fault_in_an_evaluation_saves_its_step_first(mesh, tmp_path, unbroken):
    def broken(state, done):
        raise Broken("evaluation")

    with pytest.raises(Broken):
        run(tmp_path, mesh, config=EVALUATED, evaluate=broken)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    run(tmp_path, mesh)
    assert metrics(tmp_path) == [line for line in metrics(unbroken) if "loss" in line]


def test_a_diverged_step_is_not_evaluated(mesh, tmp_path):
    def diverging(state, batch):
        state, out = step(state, batch)
        return state, out | ({"loss": np.float32("nan")} if int(state.step) == 2 else {})

    with pytest.raises(InputError, match="loss of step 2 is nan"):
        run(tmp_path, mesh, config=EVALUATED, step=diverging, evaluate=evaluate)
    assert metrics(tmp_path) == []


def test_pictures_go_to_tensorboard_under_their_step(unbroken):
    events = EventAccumulator(str(unbroken), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert [e.step for e in events.Images("eval/picture")] == [2, 4, 6, 7]
    assert [e.step for e in events.Scalars("eval/figure")] == [2, 4, 6, 7]


def test_the_rate_leaves_the_time_of_evaluations_out(mesh, tmp_path):
    def slow(state, done):
        time.sleep(1.0 if done == 4 else 0.0)
        return {}, {}

    config = dataclasses.replace(CONFIG, num_steps=6, eval_every=4)
    run(tmp_path, mesh, config=config, evaluate=slow)
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "loss" in line}
    assert lines[6]["time/images_per_second"] > 6  # of 6 images, with that second in it


def test_a_negative_interval_is_refused():
    with pytest.raises(InputError, match="eval_every -1 must be at least 0"):
        dataclasses.replace(CONFIG, eval_every=-1)


def scored(figures):
    """An evaluation that gives `figures` by step, in the order of better last."""
    return lambda state, done: ({"noise": 0.0, "loss": figures[done]}, {})


def test_the_best_checkpoint_is_kept_beside_the_newest_and_saved_when_it_is_found(mesh, tmp_path):
    config = dataclasses.replace(
        EVALUATED, keep_best="loss", keep_checkpoints=1, checkpoint_every=100
    )
    figures = {2: 3.0, 4: 1.0, 6: 2.0, 7: 5.0}
    run(tmp_path, mesh, config=config, evaluate=scored(figures))
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 7]
    # A resumed run knows the best of the run before: 1.5 is none.
    longer = dataclasses.replace(config, num_steps=9)
    run(tmp_path, mesh, config=longer, evaluate=scored({8: 1.5, 9: 6.0}))
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
        run(tmp_path, mesh, config=config, evaluate=scored({2: 1.0}))
    with pytest.raises(InputError, match="eval_every is 0"):
        dataclasses.replace(CONFIG, keep_best="loss")
