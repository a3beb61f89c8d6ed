"""Config files and overrides become dataclasses: rows of tables by kind, names of earlier versions.

A row is named where it is one of several (`conditions.class`), and says which kind it is.
"""

import dataclasses
import json

import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import denoiser
from ldm_jax.models.conditions import ClassCondition
from ldm_jax.models.unet import UNetConfig
from ldm_jax.runs import workdir as run_dir
from ldm_jax.runs.config_files import apply_overrides, build, config_dict, load_run, to_json
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sharding import make_mesh
from tests import tiny

TEN = {"kind": "class", "num_classes": 10, "context_dim": 8}


def with_conditions(conditions):
    model = dataclasses.replace(tiny.DENOISER.model, conditions=conditions)
    return dataclasses.replace(tiny.DENOISER, model=model)


TWO = {"class": ClassCondition(3, 8), "breed": ClassCondition(5, 8)}
RUNS = {
    "defaults of a denoiser": DenoiserRun(),
    "a first stage": tiny.AUTOENCODER,
    "a denoiser": tiny.DENOISER,
    "unconditional": with_conditions({}),
    "two conditions": with_conditions(TWO),
}


def run_of(model, *overrides):
    """The model of a denoiser's run with these values in its config file."""
    return apply_overrides(DenoiserRun, {"model": model}, list(overrides)).model


@pytest.mark.parametrize("name", RUNS)
def test_a_run_builds_back_from_its_record(name):
    run = RUNS[name]
    record = json.loads(json.dumps(to_json(run)))
    back = build(type(run), record)
    assert back == run and to_json(back) == record
    if isinstance(run, DenoiserRun):
        assert list(back.model.conditions) == list(run.model.conditions)  # whose order counts
        assert record["model"]["backbone"]["kind"] == "unet"


@pytest.mark.parametrize("name", RUNS)
def test_the_command_line_alone_says_everything_of_a_run(name):
    run = RUNS[name]
    # Nothing is said of defaults that are empty; a run's rows are named by their fields.
    assert apply_overrides(type(run), {}, tiny.overrides(run)) == run


def test_rows_of_a_config_file_say_their_kind_or_are_of_that_of_their_name():
    said = run_of({"conditions": {"class": TEN}})
    named = run_of({"conditions": {"class": {"num_classes": 10, "context_dim": 8}}})
    assert said == named and said.conditions == {"class": ClassCondition(10, 8)}
    other = run_of({"conditions": {"breed": TEN}})
    assert other.conditions == {"breed": ClassCondition(10, 8)}
    assert run_of({"backbone": {"kind": "unet", "width": 64}}).backbone == UNetConfig(width=64)
    assert run_of({"backbone": {"width": 64}}).backbone == UNetConfig(width=64)
    assert run_of({}) == denoiser.DenoiserConfig()


def test_the_command_line_changes_fields_of_a_row_and_leaves_the_rest():
    file = {"conditions": {"class": TEN}, "backbone": {"width": 64}}
    changed = run_of(file, "--config.model.conditions.class.num_classes=7")
    assert changed.conditions == {"class": ClassCondition(7, 8)}
    same = run_of(
        file, "--config.model.backbone.kind=unet", "--config.model.conditions.class.kind=class"
    )
    assert same == run_of(file) and same.backbone.width == 64


def test_a_row_of_kind_none_is_left_out():
    file = {"conditions": {"class": TEN}}
    assert run_of(file, "--config.model.conditions.class.kind=none").conditions == {}
    assert run_of({"conditions": {"class": {"kind": "none"}}}).conditions == {}


def test_a_row_may_be_named_on_the_command_line_only():
    one = run_of({}, "--config.model.conditions.class.num_classes=4")
    assert one.conditions == {"class": ClassCondition(4)}
    both = run_of(
        {"conditions": {"class": TEN}},
        "--config.model.conditions.breed.num_classes=4",
        "--config.model.conditions.breed.kind=class",
        "--config.model.conditions.breed.context_dim=8",
    )
    assert both.conditions == {"class": ClassCondition(10, 8), "breed": ClassCondition(4, 8)}


@dataclasses.dataclass(frozen=True)
class Patches:
    """Another backbone's fields."""

    in_channels: int = 3
    out_channels: int = 3
    depth: int = 12


@pytest.fixture
def patches(monkeypatch):
    row = denoiser.Backbone(Patches, *[lambda *a: None] * 3, ())
    monkeypatch.setitem(denoiser.BACKBONES, "patches", row)


@pytest.mark.usefixtures("patches")
def test_another_kind_has_the_fields_of_its_own():
    file = {"backbone": {"width": 64}}
    chosen = "--config.model.backbone.kind=patches"
    # Whichever comes first on the line.
    for overrides in (
        [chosen, "--config.model.backbone.depth=3"],
        ["--config.model.backbone.depth=3", chosen],
    ):
        assert run_of({}, *overrides).backbone == Patches(depth=3)
    assert run_of({"backbone": {"kind": "patches"}}).backbone == Patches()
    # What the file says of the U-Net is no word on patches.
    assert run_of(file, chosen).backbone == Patches()
    with pytest.raises(InputError, match=r"config\.model\.backbone\.width is not a field"):
        run_of({}, chosen, "--config.model.backbone.width=8")
    run = dataclasses.replace(
        tiny.DENOISER, model=dataclasses.replace(tiny.DENOISER.model, backbone=Patches(depth=2))
    )
    assert build(DenoiserRun, to_json(run)) == run


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [
        ({"backbone": {"kind": "dit"}}, [], r"config\.model\.backbone\.kind 'dit'.*'unet'"),
        ({}, ["--config.model.backbone.kind=dit"], r"backbone\.kind 'dit'.*'unet'"),
        ({"backbone": {"kind": "none"}}, [], r"backbone\.kind 'none'.*'unet'"),
        ({"conditions": {"class": {"kind": "text"}}}, [], r"class\.kind 'text'.*'class'"),
        ({}, ["--config.model.conditions.class.kind=text"], r"class\.kind 'text'.*'class'"),
        ({"conditions": {"class": 3}}, [], r"conditions\.class is 3; it must be a group"),
        ({"conditions": 3}, [], r"model\.conditions is 3; it must be a group"),
        ({"conditions": {"class": TEN | {"dim": 8}}}, [], r"conditions\.class\.dim is not a field"),
        (
            {"conditions": {"class": TEN}},
            ["--config.model.conditions.class.num_clases=3"],
            r"num_clases is not a field; did you mean --config\.model\.conditions\.class\.num_clas",
        ),
        ({"conditions": {"class": TEN | {"num_classes": "3"}}}, [], "num_classes"),
        ({"conditions": {"class": TEN | {"num_classes": 0}}}, [], "num_classes 0 must be positive"),
        (
            {"conditions": {"class": TEN}},
            ["--config.model.conditions.class.num_classes=many"],
            "many",
        ),
        ({"backbone": {"widht": 64}}, [], r"widht is not a field; did you mean 'width'"),
    ],
)
def test_what_no_row_is_like_is_refused(model, overrides, words):
    with pytest.raises(InputError, match=words):
        run_of(model, *overrides)


OLD = [
    ({"loss": {"label_dropout": 0.3}}, {"loss": {"condition_dropout": 0.3}}),
    ({"model": {"conditioner": TEN}}, {"model": {"conditions": {"class": TEN}}}),
    ({"model": {"conditioner": {"kind": "none"}}}, {}),
    (
        {"model": {"conditioner": {"kind": "none", "num_classes": 0, "context_dim": 512}}},
        {"model": {"conditions": {}}},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD)
def test_config_files_and_records_of_earlier_versions_are_understood(old, new):
    run = apply_overrides(DenoiserRun, new, [])
    assert apply_overrides(DenoiserRun, old, []) == run
    assert build(DenoiserRun, old) == run
    assert config_dict(DenoiserRun, old) == config_dict(DenoiserRun, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss.label_dropout=0.4", "loss.condition_dropout=0.4"),
        ("model.conditioner.num_classes=6", "model.conditions.class.num_classes=6"),
        ("model.conditioner.kind=none", "model.conditions.class.kind=none"),
    ],
)
@pytest.mark.parametrize(
    "file", [{"model": {"conditions": {"class": TEN}}}, {"model": {"conditioner": TEN}}]
)
def test_overrides_of_earlier_versions_are_understood(file, old, new):
    run = apply_overrides(DenoiserRun, file, [f"--config.{new}"])
    assert apply_overrides(DenoiserRun, file, [f"--config.{old}"]) == run
    assert run != apply_overrides(DenoiserRun, file, [])


def test_names_of_earlier_versions_are_those_of_denoisers_alone():
    with pytest.raises(InputError, match="label_dropout is not a field"):
        build(AutoencoderRun, {"loss": {"label_dropout": 0.3}})
    with pytest.raises(InputError, match="label_dropout is not a field"):
        apply_overrides(AutoencoderRun, {}, ["--config.loss.label_dropout=0.3"])


def test_a_record_of_an_earlier_version_is_of_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "git_state", lambda folder: {})
    run_dir.open_run(tmp_path, "train-denoiser", tiny.DENOISER, make_mesh(), {})
    path = tmp_path / "run.json"
    record = json.loads(path.read_text())
    config = record["config"]
    config["loss"]["label_dropout"] = config["loss"].pop("condition_dropout")
    config["model"]["conditioner"] = config["model"].pop("conditions")["class"]
    del config["model"]["backbone"]["kind"], config["codec"]
    path.write_text(json.dumps(record))
    assert build(DenoiserRun, run_dir.read_run(tmp_path)["config"]) == tiny.DENOISER
    run_dir.open_run(tmp_path, "train-denoiser", tiny.DENOISER, make_mesh(), {})
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"model\.conditions\.class"):
        run_dir.open_run(tmp_path, "train-denoiser", with_conditions({}), make_mesh(), {})


def test_a_preset_is_understood_with_its_conditions():
    run = load_run(DenoiserRun, "configs/denoiser.py:imagenet-ldm4", [])
    assert run.model.conditions == {"class": ClassCondition(1000, 512)}
    assert run.loss.condition_dropout == 0.1
    with pytest.raises(InputError, match=r"has no variant 'cifar'; it has: digits, imagenet-ldm4"):
        load_run(DenoiserRun, "configs/denoiser.py:cifar", [])
