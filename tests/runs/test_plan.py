"""Plans: what arms wait for, and what of them is refused."""

import dataclasses

import pytest

from ldm_jax.errors import InputError
from ldm_jax.runs import plan as plan_lib
from ldm_jax.runs.plan import Arm, families, read_denoisers, training_order
from tests import tiny

FILES = {
    "first": dataclasses.asdict(tiny.AUTOENCODER),
    "second": dataclasses.asdict(tiny.DENOISER),
}
MORE = {"init_from": "base", "init_averages": "keep"}
PLAN = {
    "first_stage": "first",
    "denoiser": "second",
    "arms": {
        "time": MORE | {"as_long_as": ("lpl", "control")},
        "lpl": MORE | {"lpl": {"weight": 1.0}},
        "control": MORE,
        "base": {},
    },
    "samples": [{"steps": 2}],
    "seeds": (0,),
    "contrasts": {"lpl - control": {"lpl": 1, "control": -1}},
}


@pytest.fixture(autouse=True)
def files(monkeypatch):
    monkeypatch.setattr(plan_lib, "load_config_file", FILES.__getitem__)
    # Whether each goes with its first stage is tests/jobs/test_experiment.py's.
    monkeypatch.setattr(plan_lib, "_check_denoiser", lambda *checked: None)


def arms(**waits):
    return {
        name: Arm(tiny.DENOISER, None, start, tuple(clocked))
        for name, (start, *clocked) in waits.items()
    }


def test_what_an_arm_waits_for_is_trained_first():
    read = read_denoisers(PLAN)
    assert list(read) == ["time", "lpl", "control", "base"]
    assert training_order(read) == ["base", "lpl", "control", "time"]
    assert read["time"].after == ("base", "lpl", "control")
    assert read["lpl"].run.lpl.weight == 1.0 and read["control"].run.lpl.weight == 0.0


def test_an_arm_stands_where_the_table_has_it_when_nothing_waits():
    assert training_order(arms(b=("",), a=("",), c=("a",))) == ["b", "a", "c"]


def test_families_stay_together_in_groups_of_a_size():
    family = arms(a=("",), b=("",), a1=("a",), a2=("a1",), b1=("b",), c=("",))
    assert families(family, 3) == [["a", "a1", "a2"], ["b", "b1", "c"]]
    assert families(family, 2) == [["a", "a1"], ["a2"], ["b", "b1"], ["c"]]
    assert families(family, 6) == [["a", "a1", "a2", "b", "b1", "c"]]


@pytest.mark.parametrize(
    ("arm", "fields", "words"),
    [
        ("base", {"init_from": "lpl"}, "wait for each other: base -> lpl -> base; take one"),
        ("lpl", {"init_from": "lpl"}, "wait for each other: lpl -> lpl"),
        ("lpl", {"init_from": "runs/x"}, "arm 'lpl': init_from 'runs/x' must be an arm of the"),
        ("time", {"as_long_as": ("lpl", "no")}, "arm 'time': as_long_as 'no' must be an arm"),
        ("time", {"as_long_as": "lpl"}, "as_long_as is 'lpl'; it must be the names of two"),
        ("time", {"as_long_as": ("lpl",)}, "it must be the names of two arms"),
        ("time", {"lpl": {"weight": 1.0}}, "and lpl must know them beforehand"),
        ("time", {"num_steps": 5}, "num_steps 5 is what as_long_as finds; leave out one"),
        ("lpl", {"log_every": 6}, "arm 'time': as_long_as 'lpl': .* lower log_every"),
        (
            "lpl",
            {"init_weights": "ema-0.5", "init_averages": "restart"},
            "init_weights 'ema-0.5': arm 'base' has",
        ),
        ("lpl", {"ema": {"more": (0.9,)}}, "'keep' goes on with .*'ema-0.9'.* arm 'base' has"),
        ("lpl", {"first_stage": {"seed": 1}}, "init_from 'base' has another first stage"),
        (
            "lpl",
            {"model": {"backbone": {"width": 16}}},
            "another architecture: backbone.width is 8 there and 16",
        ),
        (
            "lpl",
            {"init_optimizer": "keep", "optim": {"name": "lion", "schedule": "constant"}},
            "its optimizer is adamw and this run's lion; set",
        ),
        ("lpl", {"ema": {"decay": 0.5}}, "its average has decay 0.99 and this run's 0.5; give"),
        ("base", {"images": {"source": "folder"}}, "arm 'base': config.images is not a field"),
    ],
)
def test_arms_that_do_not_go_together_are_refused(arm, fields, words):
    with pytest.raises(InputError, match=words):
        read_denoisers(PLAN | {"arms": PLAN["arms"] | {arm: PLAN["arms"][arm] | fields}})


@pytest.mark.parametrize(
    ("contrasts", "words"),
    [
        ({"a": {"lpl": 1, "other": -1}}, r"contrast 'a' is of \['other'\]; it must be of arms"),
        ({"a": {}}, "contrast 'a' is of no arms"),
        ({"a": {"lpl": "1"}}, "contrasts.a.lpl is '1'; it must be a number"),
        ({"a": 1}, "contrasts.a is 1; it must be a group"),
    ],
)
def test_contrasts_are_of_arms_and_numbers(contrasts, words):
    with pytest.raises(InputError, match=words):
        read_denoisers(PLAN | {"contrasts": contrasts})


def test_new_channels_are_no_other_model():
    wide = {"codec": "mean_logvar", "model": {"backbone": {"in_channels": 0, "out_channels": 0}}}
    free = {"model": {"backbone": {"in_channels": 0, "out_channels": 0}}}
    both = {"base": free | {"codec": "mean"}, "wide": wide | {"init_from": "base"}}
    read = read_denoisers(PLAN | {"arms": both, "contrasts": {}})
    assert training_order(read) == ["base", "wide"]


def test_fewer_channels_than_the_other_arm_has_are_refused_before_any_training():
    free = {"model": {"backbone": {"in_channels": 0, "out_channels": 0}}}
    wide = free | {"codec": "mean_logvar"}
    arms = {"wide": wide, "mean": free | {"codec": "mean", "init_from": "wide"}}
    with pytest.raises(InputError, match=r"arm 'mean': .* latents of 4 channels, and this run 2"):
        read_denoisers(PLAN | {"arms": arms, "contrasts": {}})


@pytest.mark.parametrize("seeds", [(0, 0), ("a",), (True, 0), (0.5,)])
def test_seeds_are_different_whole_numbers(seeds):
    with pytest.raises(InputError, match="it must be different whole numbers"):
        read_denoisers(PLAN | {"seeds": seeds})


def test_images_of_ones_own_take_the_place_of_the_plans(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_lib, "load_config_file", lambda spec: {"arms": {}})
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    plan = plan_lib.load_plan("file", "own")
    assert plan["images"] == {"source": "folder", "path": str(tmp_path / "own")}
    assert "images" not in plan_lib.load_plan("file")


def test_every_first_stage_is_of_the_plans_images():
    images = {"resolution": 16, "held_out_fraction": 0.5}
    model = FILES["first"]["model"] | {"resolution": 16}
    arms = {"base": {}, "own": {"first_stage": {"seed": 3}}}
    FILES["first"] |= {"model": model}
    try:
        read = read_denoisers(PLAN | {"arms": arms, "images": images, "contrasts": {}})
    finally:
        FILES["first"] = dataclasses.asdict(tiny.AUTOENCODER)
    assert {arm.first_stage.images.resolution for arm in read.values()} == {16}
    assert {arm.first_stage.images.held_out_fraction for arm in read.values()} == {0.5}
