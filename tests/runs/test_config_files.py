"""Config files and overrides become dataclasses: rows of tables by kind, names of earlier versions.

A row is named where it is one of several (`conditions.class`), and says which kind it is.
"""

import dataclasses
import json

import pytest

from ldm_jax.errors import InputError
from ldm_jax.models import conditions, denoiser
from ldm_jax.models.conditions import ClassCondition
from ldm_jax.models.unet import UNetConfig
from ldm_jax.runs import workdir as run_dir
from ldm_jax.runs.build import build as trainer_of
from ldm_jax.runs.build import facts_of_config
from ldm_jax.runs.config_files import apply_overrides, build, config_dict, load_run, to_json
from ldm_jax.runs.settings import AutoencoderRun, DenoiserRun
from ldm_jax.sharding import make_mesh
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Breed(ClassCondition):
    """Another kind of row, whose parameters have a name of their own."""

    def axes(self):
        return {"breed_embedding": ("vocab", "in_channels")}


@pytest.fixture(autouse=True)
def breeds(monkeypatch):
    monkeypatch.setitem(conditions.CONDITIONS, "breed", Breed)


TEN = {"kind": "class", "num_classes": 10, "context_dim": 8}


def with_conditions(conditions):
    model = dataclasses.replace(tiny.DENOISER.model, conditions=conditions)
    return dataclasses.replace(tiny.DENOISER, model=model)


TWO = {"class": ClassCondition(3, 8), "breed": Breed(5, 8)}
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
    other = run_of({"conditions": {"label": TEN}})
    assert other.conditions == {"label": ClassCondition(10, 8)}
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
        "--config.model.conditions.label.num_classes=4",
        "--config.model.conditions.label.kind=breed",
        "--config.model.conditions.label.context_dim=8",
    )
    assert both.conditions == {"class": ClassCondition(10, 8), "label": Breed(4, 8)}


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
        (
            {"conditions": {"clas": {"num_classes": 4}}},
            [],
            r"clas says no kind.*conditions\.clas\.kind",
        ),
        ({}, ["--config.model.conditions.clas.num_classes=4"], r"clas says no kind.*'class'"),
        (
            {"conditions": {"class": TEN}},
            ["--config.model.conditions.clas.kind=none"],
            r"clas\.kind 'none' leaves out a row that is not there; choose one of .*'class'",
        ),
        ({"conditions": {"clas": {"kind": "none"}}}, [], "clas.* a row that is not there"),
        ({"conditions": {"class": TEN, "label": TEN}}, [], "'class' and 'label' both have param"),
        (
            {"conditions": {"class": TEN}},
            ["--config.model.conditions.class.context_dim=0"],
            "context_dim 0 must be at least 1",
        ),
        *[
            (
                {"conditions": {"class": TEN}},
                turned,
                r"num_classes=4 is of a row that --config\.model\.conditions\.class\.kind=none",
            )
            for turned in (
                [
                    "--config.model.conditions.class.num_classes=4",
                    "--config.model.conditions.class.kind=none",
                ],
                [
                    "--config.model.conditions.class.kind=none",
                    "--config.model.conditions.class.num_classes=4",
                ],
            )
        ],
        (
            {"conditions": {"class": TEN}},
            ["--config.model.conditions.class=none"],
            r"conditions\.class is a group; set its fields \['context_dim', 'kind', ",
        ),
        ({"conditioner": TEN, "conditions": 3}, [], "conditions is 3; it must be a group"),
        (3, [], "config.model is 3; it must be a group"),
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
    with pytest.raises(InputError, match=r"has no variant 'cifar'; it has: digits, photographs,"):
        load_run(DenoiserRun, "configs/denoiser.py:cifar", [])


def test_lists_of_a_record_are_tuples_on_the_command_line():
    record = to_json(dataclasses.replace(tiny.DENOISER, ema=tiny.AVERAGES))
    changed = apply_overrides(DenoiserRun, record, ["--config.ema.more=(0.5,)"])
    assert changed.ema == dataclasses.replace(tiny.AVERAGES, more=(0.5,))
    judged = apply_overrides(DenoiserRun, record, ["--config.samples.judge.metrics=('fid',)"])
    assert judged.samples.judge.metrics == ("fid",)


def test_a_whole_number_of_a_file_gives_way_to_a_fraction():
    run = apply_overrides(DenoiserRun, {"optim": {"lr": 1}}, ["--config.optim.lr=0.5"])
    assert run.optim.lr == 0.5


def test_the_last_word_on_a_field_counts():
    for said, more in (([(0.5,), (0.9,)], (0.9,)), ([(0.9,), ()], ())):
        run = apply_overrides(DenoiserRun, {}, [f"--config.ema.more={value}" for value in said])
        assert run.ema.more == more
    turned = ["--config.flip=true", "--noconfig.flip", "--config.flip=true"]
    assert apply_overrides(DenoiserRun, {}, turned).flip
    assert not apply_overrides(DenoiserRun, {}, turned[:2]).flip


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("README.md", "# Words", "README.md is not Python"),
        ("c.py", "x = 3", "has no function get_config"),
        ("c.py", "get_config = 3", "has no function get_config"),
        ("c.py", "def get_config():\n    return {}", "returns dict; it must be an ml_collections"),
        ("c.py", "def get_config(:", "fails with SyntaxError: .*line 1"),
        ("c.py", "import no_such_module", "fails with ModuleNotFoundError: .*no_such_module"),
        ("c.py", "def get_config(variant):\n    return {}", "fails with TypeError: .*variant"),
        ("c.py", "def get_config():\n    return {}['lr']", "fails with KeyError: 'lr'"),
        ("c.py:small", "def get_config():\n    return {}", "has no variants, .*'small'; give"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, name, text, words):
    (tmp_path / name.partition(":")[0]).write_text(text)
    with pytest.raises(InputError, match=words) as error:
        load_run(DenoiserRun, str(tmp_path / name), [])
    assert "\n" not in str(error.value)


def test_facts_are_of_a_denoisers_latents_alone():
    mesh = make_mesh()
    with pytest.raises(TypeError, match="needs the facts of its latents"):
        trainer_of(tiny.DENOISER, None, mesh)
    facts = facts_of_config(tiny.DENOISER, tiny.AUTOENCODER.model)
    with pytest.raises(TypeError, match="takes no facts"):
        trainer_of(tiny.AUTOENCODER, facts, mesh)
