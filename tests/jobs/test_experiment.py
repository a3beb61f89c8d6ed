"""Experiments: every arm and seed trained once, measured, and put in one table."""

import dataclasses
import json

import pytest

from ldm_jax.errors import InputError
from ldm_jax.jobs import evaluate, experiment, train_autoencoder
from tests import tiny

PLAN = {
    "arms": {
        "one": dataclasses.asdict(tiny.AUTOENCODER),
        "two": dataclasses.asdict(tiny.AUTOENCODER) | {"batch_size": 8},
    },
    "seeds": (0, 5),
}


@pytest.fixture
def trained(monkeypatch):
    """Runs that were trained, in order; training itself takes its place in other tests."""
    runs = []

    def train(run, workdir):
        runs.append((workdir.name, run.seed, run.batch_size))
        record = {key: {} for key in ("job", "config", "data", "command", "git")}
        record |= {key: {} for key in ("python", "packages", "devices")}
        workdir.mkdir(parents=True)
        (workdir / "run.json").write_text(json.dumps(record))

    figures = lambda folder, lpips: {"psnr_db": float(len(runs)), "ssim": 0.5, "sharpness": 1.0}  # noqa: E731
    monkeypatch.setattr(train_autoencoder, "run", train)
    monkeypatch.setattr(evaluate, "find_lpips", lambda loss: None)
    monkeypatch.setattr(evaluate, "reconstruction_figures", figures)
    return runs


def plan(monkeypatch, value):
    monkeypatch.setattr(experiment, "load_config_file", lambda spec: value)


def test_every_arm_and_seed_is_trained_once(trained, monkeypatch, tmp_path):
    plan(monkeypatch, PLAN)
    results = experiment.run("file", tmp_path)
    order = [("one-seed0", 0, 16), ("two-seed0", 0, 8), ("one-seed5", 5, 16), ("two-seed5", 5, 8)]
    assert trained == order
    assert [f["psnr_db"] for f in results["one"]] == [1.0, 3.0]
    assert experiment.run("file", tmp_path) == results
    assert trained == order
    table = (tmp_path / "results.md").read_text()
    assert "| one | 2 | 2.000 ± 1.414 | 0.500 ± 0.000 | 1.000 ± 0.000 |" in table
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results


def test_another_plan_in_the_same_workdir_is_refused(trained, monkeypatch, tmp_path):
    plan(monkeypatch, PLAN)
    experiment.run("file", tmp_path)
    plan(monkeypatch, PLAN | {"seeds": (0, 6)})
    with pytest.raises(InputError, match="another plan"):
        experiment.run("file", tmp_path)


def test_bad_arms_are_refused_before_any_training(trained, monkeypatch, tmp_path):
    for value, match in (
        (PLAN | {"arms": {"a": {"batch": 3}}}, "a.batch is not a field"),
        (PLAN | {"seeds": ()}, "at least one of each"),
        ({"arms": PLAN["arms"]}, "at least one of each"),
    ):
        plan(monkeypatch, value)
        with pytest.raises(InputError, match=match):
            experiment.run("file", tmp_path)
    assert not trained and not list(tmp_path.iterdir())
