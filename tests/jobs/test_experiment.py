"""Experiments: every arm and seed trained once, measured, and put in one table."""

import dataclasses
import functools
import json
import shutil

import pytest
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.eval import digits
from ldm_jax.eval.comparison import markdown, table
from ldm_jax.eval.extractors import EXTRACTORS
from ldm_jax.eval.judge import JudgeOptions
from ldm_jax.jobs import cache_latents, evaluate, experiment, train_autoencoder, train_denoiser
from ldm_jax.runs import plan as plan_lib
from ldm_jax.runs.config_files import load_config_file
from ldm_jax.sampling.options import SampleOptions
from tests import judged, tiny

FIRST_STAGES = {
    "arms": {
        "one": dataclasses.asdict(tiny.AUTOENCODER),
        "two": dataclasses.asdict(tiny.AUTOENCODER) | {"batch_size": 8},
    },
    "seeds": (0, 5),
}
DENOISERS = {
    "first_stage": "first",
    "denoiser": "second",
    "arms": {"six": {}, "three": {"num_steps": 3}},  # which one compiled program serves
    "samples": {
        "six": [{"steps": 2, "num": 12}, {"steps": 3, "num": 12}],
        "three": [{"steps": 2, "num": 12}],
    },
    "seeds": (3,),
}
SIX, THREE = DENOISERS["samples"]["six"], DENOISERS["samples"]["three"]
FILES = {
    "first": dataclasses.asdict(tiny.AUTOENCODER),
    "second": dataclasses.asdict(tiny.DENOISER),
}
PHOTOGRAPHS = FILES["first"] | {
    "images": FILES["first"]["images"] | {"source": "photographs", "held_out_fraction": 0.3}
}
FEW = {"preset": "custom", "extractor": "random-conv", "metrics": ("fid",), "allow_few": True}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(plan) -> the rows of an experiment in `tmp_path`; `file=` stands for the first stage."""

    def run(plan, file=FILES["first"]):
        files = FILES | {"file": plan, "first": file}
        monkeypatch.setattr(plan_lib, "load_config_file", files.__getitem__)
        return experiment.run("file", tmp_path)

    return run


@pytest.fixture
def refused(run, monkeypatch, tmp_path):
    """refused(plan, words): by an error of these words, with nothing trained or written."""

    def refused(plan, words, **files):
        for job in (train_autoencoder, cache_latents, train_denoiser):
            monkeypatch.setattr(job, "run", lambda *args: pytest.fail("it trained"))
        with pytest.raises(InputError, match=words):
            run(plan, **files)
        assert not list(tmp_path.iterdir())

    return refused


@pytest.fixture
def trained(monkeypatch):
    """First stages that were trained, in order; training itself takes its place in other tests."""
    runs = []

    def train(run, workdir):
        runs.append((workdir.name, run.seed, run.batch_size))
        record = {key: {} for key in ("job", "config", "data", "command", "git")}
        record |= {key: {} for key in ("python", "packages", "devices")}
        workdir.mkdir(parents=True)
        (workdir / "run.json").write_text(json.dumps(record))

    def figures(folder, lpips):
        return {"psnr_db": float(len(runs)), "ssim": 0.5, "sharpness": 1.0, "step": 6.0}

    monkeypatch.setattr(train_autoencoder, "run", train)
    monkeypatch.setattr(experiment, "find_lpips", lambda loss: None)
    monkeypatch.setattr(experiment, "reconstruction_figures", figures)
    return runs


@pytest.fixture
def copied(first_stage, monkeypatch):
    """Folders of first stages, each a copy of a trained one; the classifier takes five steps."""
    folders = []

    def train(run, workdir):
        folders.append(workdir.name)
        shutil.copytree(first_stage, workdir, dirs_exist_ok=True)

    monkeypatch.setattr(train_autoencoder, "run", train)
    monkeypatch.setattr(cache_latents, "run", lambda workdir, settings: None)
    short = functools.partial(digits.train_classifier, num_steps=5)
    monkeypatch.setattr(digits, "train_classifier", short)
    return folders


def test_every_first_stage_is_trained_once(trained, run, tmp_path):
    rows = run(FIRST_STAGES)
    order = [("one-seed0", 0, 16), ("two-seed0", 0, 8), ("one-seed5", 5, 16), ("two-seed5", 5, 8)]
    assert trained == order
    assert [(r["arm"], r["seed"], r["psnr_db"]) for r in rows] == [
        ("one", 0, 1.0), ("two", 0, 2.0), ("one", 5, 3.0), ("two", 5, 4.0),
    ]  # fmt: skip
    assert run(FIRST_STAGES) == rows
    assert trained == order
    assert (tmp_path / "results.md").read_text().splitlines() == [
        "Mean ± standard error over seeds",
        "",
        "| arm | seeds | psnr_db | ssim | sharpness |",
        "| --- | --- | --- | --- | --- |",
        "| one | 2 | 2.000 ± 1.000 | 0.500 ± 0.000 | 1.000 ± 0.000 |",
        "| two | 2 | 3.000 ± 1.000 | 0.500 ± 0.000 | 1.000 ± 0.000 |",
    ]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["results"] == rows and record["plan"]["seeds"] == [0, 5]


def test_arms_of_first_stages_change_their_base(trained, run):
    run({"first_stage": "first", "arms": {"one": {}, "two": {"batch_size": 8}}, "seeds": (0,)})
    assert trained == [("one-seed0", 0, 16), ("two-seed0", 0, 8)]


def test_another_plan_in_the_same_workdir_is_refused(trained, run):
    run(FIRST_STAGES)
    with pytest.raises(InputError, match="another plan"):
        run(FIRST_STAGES | {"seeds": (0, 6)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": {"a": {"batch": 3}}}, "arm 'a': config.batch is not a field"),
        ({"arms": {}}, "none of it empty"),
        ({"seeds": ()}, "none of it empty"),
        ({"samples": {"one": []}}, "none of it empty, and may give .'contrasts', 'first_stage'"),
        ({"seeds": (0, -1)}, "seed -1 must be in"),
        ({"seeds": 3}, "seeds is 3; it must be a tuple"),
        ({"arms": "one"}, "arms is 'one'; it must be a group of fields"),
        ({"arms": {"a": "one"}}, "arms.a is 'one'; it must be a group of fields"),
        ({"arms": {"a": {"model": 3}}}, "arm 'a': config.model is 3; it must be a group"),
        ({"first_stage": {"seed": 3}}, "first_stage is .* it must be the text FILE:VARIANT"),
        ({"arms": {"a": PHOTOGRAPHS | {"batch_size": 5}}}, "batch_size 5 must"),
        (
            {"arms": {"a": {"images": {"source": "folder", "path": "/none", "resolution": 256}}}},
            "arm 'a': .*/none",
        ),
        (
            {"arms": {"a": FILES["first"] | {"init_from": "/none"}}},
            "arm 'a': workdir /none is not there",
        ),
    ],
)
def test_a_bad_plan_of_first_stages_is_refused_before_any_training(change, words, refused):
    refused(FIRST_STAGES | change, words)


def test_every_arm_is_sampled_in_every_way_and_nothing_is_done_twice(
    copied, run, monkeypatch, tmp_path
):
    rows = run(DENOISERS)
    assert [(r["arm"], r["steps"], r["seed"]) for r in rows] == [
        ("six", 2, 3), ("six", 3, 3), ("three", 2, 3),
    ]  # fmt: skip
    assert all(r["num_samples"] == 12 and 0 <= r["sample_accuracy"] <= 1 for r in rows)
    assert len({r["frechet_samples"] for r in rows}) == 3
    runs = [read_run(tmp_path / f"{arm}-seed3") for arm in DENOISERS["arms"]]
    assert [run["config"].pop("num_steps") for run in runs] == [6, 3]
    assert runs[0]["config"] == runs[1]["config"] and runs[0]["data"] == runs[1]["data"]
    assert runs[0]["config"]["seed"] == 3
    assert copied == ["autoencoder"]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["results"] == rows
    assert "| ddim | 3 | six | 1 |" in (tmp_path / "results.md").read_text()

    monkeypatch.setattr(train_denoiser, "run", lambda *args: pytest.fail("trained twice"))
    assert run(DENOISERS) == rows
    assert copied == ["autoencoder"]


def test_an_arm_may_have_its_own_first_stage_and_a_network_may_judge(
    copied, run, monkeypatch, tmp_path
):
    monkeypatch.setitem(EXTRACTORS, "random-conv", judged.extractor("random-conv", []))
    own = {"num_steps": 3, "first_stage": {"seed": 7}}
    plan = DENOISERS | {"arms": {"six": own, "three": own}, "judge": FEW}
    plan |= {"samples": {"six": THREE, "three": THREE}}
    rows = run(plan)
    assert copied == ["autoencoder-six"]
    runs = [read_run(tmp_path / f"{arm}-seed3") for arm in plan["arms"]]
    assert {run["config"]["autoencoder"] for run in runs} == {str(tmp_path / "autoencoder-six")}
    figures = [{n: v for n, v in row.items() if n.startswith("frechet12-custom-")} for row in rows]
    assert all(len(of_row) == 1 for of_row in figures)
    # Both arms are one run here: the figure's name says how it was sampled, not by which arm.
    assert figures[0] == figures[1]
    way, judge = SampleOptions(steps=2, num=12), JudgeOptions(**FEW)
    assert evaluate.denoiser(tmp_path / "six-seed3", way, judge) == figures[0]
    table = (tmp_path / "results.md").read_text().splitlines()
    head = ["arm", "seeds", "sample_accuracy", "frechet_samples", "frechet12-custom"]
    assert table[2].split(" | ")[2:7] == head
    assert [line[:20] for line in table[4:]] == ["| ddim | 2 | six | 1", "| ddim | 2 | three |"]


def read_run(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": ()}, "none of it empty"),
        ({"judges": FEW}, "may give .'contrasts', 'images', 'judge'"),
        ({"judge": "adm"}, "judge is 'adm'; it must be a group of fields"),
        ({"samples": "few"}, "samples is 'few'; it must be a group of fields"),
        ({"samples": {"six": 2, "three": THREE}}, r"samples\.six is 2; it must be a tuple"),
        ({"samples": {"six": SIX, "three": ["ddim"]}}, "arm 'three': samples is 'ddim'; it must"),
        ({"arms": {"six": {"lr": 1}, "three": {}}}, "arm 'six': config.lr is not a field"),
        ({"arms": {"six": {}}}, "give the same names"),
        ({"samples": {"six": SIX, "three": [{"step_count": 3}]}}, "step_count is not a field"),
        ({"samples": {"six": SIX, "three": []}}, "arm 'three': its samples are empty"),
        ({"samples": {"six": SIX, "three": [{"sampler": "edm"}]}}, "arm 'three': .*use 'heun'"),
        (
            {"samples": {"six": [{"steps": 2}, {"steps": 2, "seed": 1}], "three": THREE}},
            "arm 'six': its samples differ in seed",
        ),
        (
            {"samples": {"six": SIX, "three": [{"classes": (10,)}]}},
            "arm 'three': class 10 is unknown",
        ),
        (
            {"samples": {"six": SIX, "three": [{"init_images": "/none", "strength": 0.5}]}},
            "arm 'three': .*/none",
        ),
        ({"arms": {"six": {"autoencoder": "/none"}, "three": {}}}, "autoencoder '/none' is the"),
        (
            {"arms": {"six": {}, "three": {"first_stage": {"model": {"latent_channels": 3}}}}},
            "arm 'three': .*in_channels is 2, .* have 3 channels",
        ),
        (
            {
                "arms": {
                    "six": {},
                    "three": {
                        "first_stage": {"images": {"resolution": 16}, "model": {"resolution": 16}}
                    },
                }
            },
            "arm 'three': .*the same images",
        ),
        (
            {"arms": {"six": {}, "three": {"objective": {"parameterisation": "velocity"}}}},
            "arm 'three': .*velocity",
        ),
        ({"judge": {"preset": "custom"}}, "an extractor belongs to preset 'custom'"),
        ({"judge": FEW | {"reference": "/none.npz"}}, "/none.npz"),
        ({"judge": FEW | {"allow_few": False}}, "12"),
        (
            {
                "judge": FEW,
                "samples": {"six": SIX, "three": [{"noise": "noise.npy"}]},
            },
            "noise",
        ),
    ],
)
def test_a_bad_plan_of_denoisers_is_refused_before_any_training(change, words, refused):
    refused(DENOISERS | change, words)


def test_images_that_are_no_digits_are_judged_by_a_network(refused):
    denoiser = {"model": {"conditioner": {"kind": "none"}}}
    plan = DENOISERS | {"arms": {"six": denoiser, "three": denoiser}}
    judge = {"preset": "custom", "extractor": "random-conv"}
    refused(plan | {"judge": judge}, "12 images for 256 features", file=PHOTOGRAPHS)


def test_few_photographs_of_ones_own_are_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_lib, "load_config_file", (FILES | {"first": PHOTOGRAPHS}).__getitem__)
    arms = {"six": {"model": {"conditioner": {"kind": "none"}}}}
    experiment.denoisers(DENOISERS | {"arms": arms, "samples": THREE}, tmp_path)
    assert "note: a Fréchet distance of 12 images in 256 features" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


PLANS = {
    "objectives.py": 5,
    "first_stage.py:photographs": 4,
    "lpl.py:photographs": 8,
    "lpl.py:smoke": 4,
    "decoupled.py:photographs": 3,
    "lpl_decoupled.py:digits": 6,
}


@pytest.mark.parametrize(("variant", "arms"), PLANS.items())
def test_the_plans_of_this_repository_are_good(variant, arms, tmp_path):
    plan = load_config_file(f"configs/experiments/{variant}")
    kind = experiment.denoisers if "denoiser" in plan else experiment.first_stages
    assert len(kind(plan, tmp_path).arms) == arms
    assert not list(tmp_path.iterdir())


def test_the_objectives_compared_are_five_different_ones():
    plan = load_config_file("configs/experiments/objectives.py")
    said = {
        arm: (f["process"]["kind"], f["objective"]["parameterisation"])
        for arm, f in plan["arms"].items()
    }
    assert said == {
        "eps": ("ldm_linear", "eps"),
        "x0": ("ldm_linear", "x0"),
        "v": ("ldm_linear", "v"),
        "flow": ("flow", "velocity"),
        "edm": ("edm", "preconditioned"),
    }


def lines_of(rows):
    """The table in Markdown, without its title."""
    return markdown([table(rows)]).splitlines()[2:]


def test_the_table_averages_over_seeds_and_leaves_gaps():
    row = {"sampler": "ddim", "steps": 5, "num_samples": 12.0}
    rows = [
        {**row, "arm": "a", "seed": 0, "sample_accuracy": 0.5},
        {**row, "arm": "b", "seed": 0, "frechet_samples": 2.0, "sampler": "heun"},
        {**row, "arm": "a", "seed": 1, "sample_accuracy": 0.7},
    ]
    assert lines_of(rows) == [
        "| sampler | steps | arm | seeds | sample_accuracy | frechet_samples |",
        "| --- | --- | --- | --- | --- | --- |",
        "| ddim | 5 | a | 2 | 0.600 ± 0.100 |  |",
        "| heun | 5 | b | 1 |  | 2.000 |",
    ]


def test_the_table_does_not_average_over_ways_of_sampling():
    row = {"sampler": "ddim", "steps": 5, "spacing": "auto", "arm": "a", "seed": 0}
    rows = [{**row, "guidance": g, "sample_accuracy": a} for g, a in ((1.0, 0.5), (2.0, 1.0))]
    assert lines_of(rows)[2:] == [
        "| ddim | 5 | 1.0 | a | 1 | 0.500 |",
        "| ddim | 5 | 2.0 | a | 1 | 1.000 |",
    ]


def test_the_table_shows_small_figures_and_strips_no_protocol_but_its_hash():
    rows = [{"arm": "a", "seed": 0, "kid50k-adm-12345678": 0.00123, "step": 6.0}]
    assert lines_of(rows) == [
        "| arm | seeds | kid50k-adm |", "| --- | --- | --- |", "| a | 1 | 0.00123 |",
    ]  # fmt: skip


CONTINUED = DENOISERS | {
    "arms": {
        "time": {"init_from": "base", "as_long_as": ("more", "control")},
        "more": {"init_from": "base", "lpl": {"weight": 1.0}},
        "control": {"init_from": "base"},
        "base": {},
    },
    "samples": [{"steps": 2, "num": 12}, {"steps": 3, "num": 12}],
    "seeds": (3, 4),
    "contrasts": {"more - time": {"more": 1, "time": -1}},
}


@pytest.fixture
def timed(monkeypatch):
    """Trainings of denoisers, (folder, steps, what it begins with), that only write their speed."""
    runs, speed = [], {"base": 90.0, "control": 80.0, "more": 20.0, "time": 80.0}

    def train(run, workdir):
        start = run.init_from.rsplit("/", 1)[-1]
        runs.append((workdir.name, run.num_steps, start))
        if workdir.name in stopped:
            raise KeyboardInterrupt
        workdir.mkdir(parents=True, exist_ok=True)
        keys = ("job", "config", "data", "command", "git", "python", "packages", "devices")
        (workdir / "run.json").write_text(json.dumps({key: {} for key in keys}))
        line = {"step": 1, "time/images_per_second": speed.get(workdir.name.split("-")[0], 1.0)}
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    def measure(model, way, folder):
        arm, seed = folder.name.split("-seed")
        figure = len(arm) + int(seed) * (arm == "time") / 10
        return {"sampler": way.sampler, "steps": way.steps, "frechet_samples": figure}

    stopped = {"time-seed3"}
    monkeypatch.setattr(train_denoiser, "run", train)
    monkeypatch.setattr(train_autoencoder, "run", lambda run, folder: None)
    monkeypatch.setattr(cache_latents, "run", lambda folder, options: None)
    monkeypatch.setattr(plan_lib, "check_traces", lambda training: None)
    monkeypatch.setattr(experiment, "load_model", lambda folder, which: None)
    monkeypatch.setattr(experiment, "prepare_measure", lambda *a: (measure, None))
    return runs, stopped


def test_arms_go_on_from_each_other_stop_and_are_contrasted(timed, run, tmp_path, capsys):
    runs, stopped = timed
    with pytest.raises(KeyboardInterrupt):
        run(CONTINUED)
    first = [
        ("base-seed3", 6, ""),
        ("control-seed3", 6, "base-seed3"),
        ("more-seed3", 6, "base-seed3"),
    ]
    # A quarter of the speed: four times the steps.
    late = ("time-seed3", 24, "base-seed3")
    assert sorted(runs) == sorted([*first, late]) and runs[0] == first[0] and runs[-1] == late
    text = (tmp_path / "results.md").read_text()
    assert "| control |" in text and "| time |" not in text  # what is there already is compared
    assert (tmp_path / "report.html").exists()
    stopped.clear()
    runs.clear()
    rows = run(CONTINUED)
    assert runs[0] == late and [name for name, _, _ in runs[1:]].count("base-seed4") == 1
    assert len(runs) == 5 and all(name.endswith("seed4") for name, _, _ in runs[1:])
    assert [row["arm"] for row in rows[::2]] == [*CONTINUED["arms"]] * 2
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["steps"] == {"base": 6, "control": 6, "more": 6, "time": 24}
    assert {"autoencoder", "base-seed3", "time-seed4"} < record["seconds"].keys()
    by_steps = {found["steps"]: found for found in record["contrasts"]}
    for steps in (2, 3):
        found = by_steps[steps]
        # 4 - 4.3 and 4 - 4.4
        assert found["mean"] == pytest.approx(-0.35) and found["seeds"] == 2
        assert found["low"] == pytest.approx(-0.35 - 12.706 * 0.05, abs=1e-3)
    assert "run 5 of 8: " in capsys.readouterr().out
    runs.clear()
    assert run(CONTINUED) == rows and not runs


def test_images_of_ones_own_are_the_plans(timed, run, tmp_path, monkeypatch):
    _, stopped = timed
    stopped.clear()
    own = tmp_path / "own"
    own.mkdir()
    for i, image in enumerate(judged.digits(40)):
        Image.fromarray(image).save(own / f"{i}.png")
    plan = DENOISERS | {"judge": FEW}
    files = FILES | {"file": plan}
    monkeypatch.setattr(plan_lib, "load_config_file", files.__getitem__)
    fields = DENOISERS["arms"]["six"] | {"model": {"conditioner": {"kind": "none"}}}
    plan |= {"arms": {"six": fields, "three": fields | {"num_steps": 3}}}
    experiment.run("file", tmp_path / "out", str(own))
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["plan"]["images"] == {"source": "folder", "path": str(own)}
    assert f" --images={own} --workdir=" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(InputError, match="holds an experiment with another plan"):
        experiment.run("file", tmp_path / "out")
