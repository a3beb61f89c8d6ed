"""run.json: what ran, and what a second start may not change."""

import dataclasses
import json
import os

import pytest

from ldm_jax.errors import InputError
from ldm_jax.runs import workdir as run_dir
from ldm_jax.runs.settings import DenoiserRun, Samples
from ldm_jax.runs.workdir import open_run, read_run, write_json
from ldm_jax.sharding import MeshConfig, make_mesh
from tests import tiny

RUN = tiny.DENOISER
DATA = {"manifest": "abc", "count": 12}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    """Two git processes per start cost more than everything else here."""
    monkeypatch.setattr(run_dir, "git_state", lambda folder: {"commit": "f00", "dirty": False})


def start(workdir, mesh, job="train-denoiser", data=DATA, **changes):
    config = dataclasses.replace(RUN, **changes)
    open_run(workdir, job, config, mesh, data)


def test_record_holds_what_a_later_job_and_a_reader_need(tmp_path, mesh):
    start(tmp_path / "new" / "run", mesh)
    record = read_run(tmp_path / "new" / "run")
    assert record["job"] == "train-denoiser"
    assert record["config"]["model"]["backbone"]["width_multipliers"] == [1, 2]
    assert record["config"]["seed"] == RUN.seed
    assert record["data"] == DATA
    assert record["git"] == {"commit": "f00", "dirty": False}
    assert record["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert record["devices"]["count"] == 8 and record["devices"]["platform"] == "cpu"
    assert set(record["packages"]) >= {"jax", "flax", "optax"}
    assert "unknown" not in record["packages"].values()
    assert record["command"]
    assert record["config"].keys() == {f.name for f in dataclasses.fields(DenoiserRun)}


def test_same_start_again_is_welcome_and_earlier_ones_are_kept(tmp_path, mesh):
    start(tmp_path, mesh)
    first = read_run(tmp_path)
    assert "history" not in first
    start(tmp_path, mesh)
    start(tmp_path, make_mesh(MeshConfig(2, 4, 1)))
    record = read_run(tmp_path)
    assert len(record["history"]) == 2
    assert record["history"][0] == {k: first[k] for k in ("started", "command", "git", "mesh")}
    assert record["mesh"]["fsdp"] == 4
    assert all("history" not in h for h in record["history"])


@pytest.mark.parametrize(
    ("changes", "field", "old", "new"),
    [
        ({"seed": 5}, "seed", "0", "5"),
        ({"batch_size": 32}, "batch_size", "16", "32"),
        ({"optim": dataclasses.replace(RUN.optim, lr=0.5)}, "optim.lr", "0.001", "0.5"),
        ({"whitening": "none"}, "whitening", "'channel'", "'none'"),
        (
            {"model": dataclasses.replace(
                RUN.model, backbone=dataclasses.replace(RUN.model.backbone, num_heads=4)
            )},
            "model.backbone.num_heads", "2", "4",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and "." in x else "",
)  # fmt: skip
def test_start_with_another_field_is_refused_with_both_values(
    tmp_path, mesh, changes, field, old, new
):
    start(tmp_path, mesh)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(InputError) as error:
        start(tmp_path, mesh, **changes)
    assert f"{field} is {old} there and {new} now" in str(error.value)
    assert str(tmp_path) in str(error.value) and "use a new workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "run.json").read_bytes() == before


def test_many_different_fields_are_counted_and_the_first_named(tmp_path, mesh):
    start(tmp_path, mesh)
    with pytest.raises(InputError, match=r"batch_size .*; flip .*; latents .*\(and 2 more\)"):
        start(tmp_path, mesh, batch_size=8, flip=True, latents="l", seed=3, whitening="none")


def test_length_is_not_free_when_the_learning_rate_decays_with_it(tmp_path, mesh):
    cosine = dataclasses.replace(RUN.optim, schedule="cosine")
    start(tmp_path, mesh, optim=cosine)
    with pytest.raises(InputError, match=r"num_steps is \d+ there and 99 now"):
        start(tmp_path, mesh, optim=cosine, num_steps=99)


def test_how_long_where_and_how_often_may_change(tmp_path, mesh):
    start(tmp_path, mesh)
    free = {
        "num_steps": 99,
        "mesh": MeshConfig(2, 4, 1),
        "log_every": 7,
        "checkpoint_every": 9,
        "keep_checkpoints": 5,
        "keep_every": 3,
        "data_threads": 4,
        "accumulate": 2,
        "max_bad_steps": 3,
        "eval_examples": 7,
        "loss_bins": 2,
        "samples": Samples(steps=7),
    }
    of_first_stages = {"eval_every": 5, "eval_images": 6, "init_from": "elsewhere"}
    of_first_stages |= {"keep_best": "psnr"}
    assert set(free) | set(of_first_stages) == set(run_dir.FREE_FIELDS)
    for name, value in free.items():
        open_run(tmp_path, "train-denoiser", dataclasses.replace(RUN, **{name: value}), mesh, DATA)
        start(tmp_path, mesh)

    def first_stage(**changes):
        run = dataclasses.replace(tiny.AUTOENCODER, **changes)
        open_run(tmp_path / "first", "j", run, mesh, DATA)

    first_stage()
    for name, value in of_first_stages.items():
        first_stage(**{"eval_every": 5, name: value})


def test_run_of_an_earlier_version_lacks_fields_that_had_their_defaults(tmp_path, mesh):
    start(tmp_path, mesh)
    record = json.loads((tmp_path / "run.json").read_text())
    new = "flip"
    assert record["config"].pop(new) == getattr(type(RUN)(), new)
    del record["config"]["optim"]["b2"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    start(tmp_path, mesh)
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="flip is False there and True now"):
        open_run(tmp_path, "train-denoiser", dataclasses.replace(RUN, flip=True), mesh, DATA)


def test_field_of_a_group_is_not_free_for_having_a_free_name(tmp_path, mesh):
    record = {"job": "j", "config": {"a": {"mesh": 1}, "mesh": {"data": 1}}, "data": {}}
    other = {"job": "j", "config": {"a": {"mesh": 2}, "mesh": {"data": 2}}, "data": {}}
    with pytest.raises(InputError, match=r"another config: a\.mesh is 1 there and 2 now;"):
        run_dir.check_same(tmp_path, record, other)


def test_field_that_only_one_side_has_is_named(tmp_path):
    record = {"job": "j", "config": {"a": 1}, "data": {}}
    with pytest.raises(InputError, match=r"b is 'absent' there and 2 now"):
        run_dir.check_same(tmp_path, record, record | {"config": {"a": 1, "b": 2}})


def test_other_data_is_refused(tmp_path, mesh):
    start(tmp_path, mesh)
    with pytest.raises(InputError, match=r"another data: manifest is 'abc' there and 'xyz' now"):
        start(tmp_path, mesh, data=DATA | {"manifest": "xyz"})


def test_workdir_of_another_job_is_refused(tmp_path, mesh):
    start(tmp_path, mesh)
    with pytest.raises(InputError, match="belongs to `ldm train-denoiser`, not `ldm train-auto"):
        open_run(tmp_path, "train-autoencoder", tiny.AUTOENCODER, mesh, DATA)


def test_checkpoints_without_a_record_are_refused_and_left_alone(tmp_path, mesh):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds checkpoints but no run\.json; move them away"):
        start(tmp_path, mesh)
    assert not (tmp_path / "run.json").exists()


def test_folder_without_a_record_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no run\.json: it is not the run directory"):
        read_run(tmp_path)


def test_record_is_replaced_in_one_move(tmp_path, monkeypatch):
    """Killed between writing and renaming, the old record stands whole."""
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    assert os.listdir(tmp_path) == ["run.json"]


def test_git_state_is_empty_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_dir.git_state(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert run_dir.git_state(tmp_path) == {}
