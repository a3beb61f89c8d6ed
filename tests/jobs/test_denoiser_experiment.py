"""Experiments on denoisers: one first stage, every arm sampled in every way, nothing done twice."""

import dataclasses
import functools
import json
import shutil

import pytest

from ldm_jax.errors import InputError
from ldm_jax.eval import digits
from ldm_jax.jobs import (
    cache_latents,
    denoiser_experiment,
    experiment,
    train_autoencoder,
    train_denoiser,
)
from tests import tiny

FILES = {
    "first": dataclasses.asdict(tiny.AUTOENCODER),
    "second": dataclasses.asdict(tiny.DENOISER),
}
PLAN = {
    "first_stage": "first",
    "denoiser": "second",
    "arms": {"six": {}, "three": {"num_steps": 3}},  # which one compiled program serves
    "samples": {
        "six": [{"steps": 2, "num": 12}, {"steps": 3, "num": 12}],
        "three": [{"steps": 2, "num": 12}],
    },
    "seeds": (3,),
}


@pytest.fixture(autouse=True)
def files(monkeypatch):
    monkeypatch.setattr(denoiser_experiment, "load_config_file", FILES.__getitem__)
    monkeypatch.setattr(experiment, "load_config_file", lambda spec: PLAN)
    short = functools.partial(digits.train_classifier, num_steps=5)
    monkeypatch.setattr(digits, "train_classifier", short)


def test_every_arm_is_sampled_in_every_way_and_nothing_is_done_twice(
    first_stage, monkeypatch, tmp_path
):
    copy = functools.partial(shutil.copytree, first_stage, dirs_exist_ok=True)
    monkeypatch.setattr(train_autoencoder, "run", lambda run, workdir: copy(workdir))
    monkeypatch.setattr(cache_latents, "run", lambda workdir, settings: None)
    rows = experiment.run("file", tmp_path)
    assert [(r["arm"], r["steps"], r["seed"]) for r in rows] == [
        ("six", 2, 3), ("six", 3, 3), ("three", 2, 3),
    ]  # fmt: skip
    assert all(r["num_samples"] == 12 and 0 <= r["sample_accuracy"] <= 1 for r in rows)
    assert len({r["frechet_samples"] for r in rows}) == 3
    runs = [json.loads((tmp_path / f"{arm}-seed3/run.json").read_text()) for arm in PLAN["arms"]]
    assert [run["config"].pop("num_steps") for run in runs] == [6, 3]
    assert runs[0]["config"] == runs[1]["config"] and runs[0]["data"] == runs[1]["data"]
    assert runs[0]["config"]["seed"] == 3
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["results"] == rows
    assert "| ddim | 3 |" in (tmp_path / "results.md").read_text()

    def never(*args):
        raise AssertionError("trained twice")

    monkeypatch.setattr(train_denoiser, "run", never)
    assert experiment.run("file", tmp_path) == rows


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seeds": ()}, "none of it empty"),
        ({"arms": {"six": {"lr": 1}, "three": {}}}, "config.lr is not a field"),
        ({"arms": {"six": {}}}, "give the same names"),
        (
            {"samples": PLAN["samples"] | {"three": [{"step_count": 3}]}},
            "three.step_count is not a field",
        ),
        ({"samples": PLAN["samples"] | {"three": []}}, "samples of 'three' are empty"),
        ({"samples": PLAN["samples"] | {"three": [{"sampler": "edm"}]}}, "use 'heun'"),
        (
            {"samples": PLAN["samples"] | {"six": [{"steps": 2}, {"steps": 2, "seed": 1}]}},
            "samples of 'six' differ in seed",
        ),
    ],
)
def test_a_bad_plan_is_refused_before_any_training(change, match, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "load_config_file", lambda spec: PLAN | change)
    monkeypatch.setattr(train_autoencoder, "run", lambda *args: pytest.fail("it trained"))
    with pytest.raises(InputError, match=match):
        experiment.run("file", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_table_averages_over_seeds_and_leaves_gaps():
    row = {"sampler": "ddim", "steps": 5, "frechet_samples": 2.0}
    rows = [
        {**row, "arm": "a", "seed": 0, "sample_accuracy": 0.5},
        {**row, "arm": "a", "seed": 1, "sample_accuracy": 0.7},
        {**row, "arm": "b", "seed": 0, "sample_accuracy": 1.0, "sampler": "heun"},
    ]
    table = denoiser_experiment.table(rows).splitlines()
    assert table[2:] == ["| ddim | 5 | 60.0 % / 2.00 |  |", "| heun | 5 |  | 100.0 % / 2.00 |"]


def test_the_table_does_not_average_over_ways_of_sampling():
    row = {"sampler": "ddim", "steps": 5, "spacing": "auto", "frechet_samples": 2.0}
    row |= {"arm": "a", "seed": 0, "sample_accuracy": 0.5}
    rows = [{**row, "guidance": 1.0}, {**row, "guidance": 2.0, "sample_accuracy": 1.0}]
    table = denoiser_experiment.table(rows).splitlines()
    assert table[2:] == [
        "| ddim, guidance 1.0, spacing auto | 5 | 50.0 % / 2.00 |",
        "| ddim, guidance 2.0, spacing auto | 5 | 100.0 % / 2.00 |",
    ]
